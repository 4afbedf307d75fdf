"""DeepSeek-V4-Flash and machines for it, as `jaxspark simulate` assumes them."""

import json
import pathlib
from dataclasses import dataclass

import numpy as np

from jaxspark.configuration import Configuration, option
from jaxspark.decoding import Costs, Fixed, Lagged, Scheduler
from jaxspark.simulation.frontier import Policy
from jaxspark.simulation.roofline import Machine, Network, roofline_costs
from jaxspark.simulation.simulate import Load, Trace


@dataclass(frozen=True, kw_only=True)
class StatedOptions(Configuration):
    """Assumed acceptance, for simulations without a recorded trace."""

    acceptance: str | None = option(
        "JSON of stated acceptance, given all drafts before, by domain and position: "
        '{"math": [0.9, 0.88, ...], ...}; by default a constant for each of three '
        "domains.",
        None,
    )
    concentration: float = option(
        "Concentration of stated acceptance: chances of drafts follow Beta "
        "distributions of it; the smaller, the more confidences tell.",
        2.0,
        at_least=0.01,
    )
    mtp_acceptance: float | None = option(
        "Acceptance of MTP-1's draft; by default that of DSpark's first.",
        None,
        at_least=0,
        at_most=1,
    )


MACHINES = (
    Machine(
        name="8 x H100",
        chips=8,
        bandwidth=3.35e12,
        flops=1.979e15,
        efficiency=0.6,
        overhead=4e-3,
    ),
    Machine(
        name="TPU v5p-16",
        chips=8,
        bandwidth=2.765e12,
        flops=9.18e14,
        efficiency=0.6,
        overhead=4e-3,
    ),
)
# One expert of one layer: three 4096 x 2048 matrices of 4 bits, a scale byte for 32.
EXPERT = 3 * 4096 * 2048 * (1 / 2 + 1 / 32)
HEAD = 129280 * 4096 * 2


def weighs(name: str, layers: int, file_bytes: float, **options) -> Network:
    """A network of V4-Flash's experts; what else its released files hold is dense."""
    return Network(
        name=name,
        dense_bytes=file_bytes - layers * 256 * EXPERT,
        experts=256,
        experts_per_token=6,
        expert_bytes=layers * EXPERT,
        **options,
    )


# Bytes and active parameters are those of jaxspark describe. Of an embedding a pass
# reads a few rows; the drafters read the target's head.
V4_FLASH = weighs(
    "DeepSeek-V4-Flash, FP8 and FP4 experts",
    43,
    156.016e9 - HEAD,
    active=13.27e9,
    cache_bytes=13.2e6,
)
MTP = weighs("its MTP-1 module", 1, 3.594e9 + HEAD, active=0.87e9, cache_bytes=75e3)
DSPARK = weighs(
    "its DSpark drafter, 3 layers", 3, 10.863e9 + HEAD, active=1.5e9, cache_bytes=225e3
)
NETWORKS = (V4_FLASH, MTP, DSPARK)
BLOCK = 5
# Conditional acceptance of every place: no suffix decay. The values give accepted
# lengths of 5.3, 3.8 and 2.9 at block 7, as published for math, chat and poetry.
ACCEPTANCE = {"math": 0.875, "chat": 0.77, "poetry": 0.67}


def assumptions(
    options: StatedOptions, *, trace: str | None, rate: float | None, rounds: int
) -> list[str]:
    """All that the roofline and stated acceptance suppose.

    Args:
      options: stated acceptance.
      trace: where recorded rounds are from; None for stated ones.
      rate: requests per second; None for a closed loop.
      rounds: of each number of users.
    """
    drafts = f"as recorded in {trace}"
    if not trace:
        curves = (
            f"{name} {', '.join(f'{rate:g}' for rate in rates)}"
            for name, rates in stated(options.acceptance).items()
        )
        drafts = f"{'; '.join(curves)}; of as many requests each"
    single = options.mtp_acceptance
    return [
        "A pass takes an overhead plus the slower of memory traffic and arithmetic; "
        "both reach 60 % of the chips' peak (H100: 3.35 TB/s, 1979 TFLOP/s in FP8; "
        "v5p: 2.765 TB/s, 918 TOP/s in 8 bits, v5p-16 are 8 chips).",
        "Overhead of a target pass: 4 ms (launches and communication of 43 layers; a "
        "round without drafts took 4.3 ms in published runs on 8 B200), of the DSpark "
        "drafter 0.5 ms, of MTP-1 0.15 ms, in proportion to layers, plus the "
        "sequential head.",
        *(
            f"{net.name}: {net.dense_bytes / 1e9:.2f} GB besides experts, "
            f"{net.expert_bytes / 1e6:.1f} MB per expert of all layers, "
            f"{net.active / 1e9:.2f} billion parameters per token."
            for net in NETWORKS
        ),
        "Weights are read once per pass; of 256 routed experts those that its tokens "
        "reach when each chooses 6 evenly. Experts are balanced over chips.",
        "Cache read per request and pass: 13.2 MB (context 8192, 21 CSA layers with "
        "512 chosen entries, 20 HCA layers, window 128).",
        f"Acceptance given all drafts before: {drafts}. MTP-1's draft is accepted "
        + ("as often as DSpark's first." if single is None else f"at {single:g}."),
        "Confidences are calibrated"
        + (
            "."
            if trace
            else "; a draft's chance follows a Beta distribution around the mean, of "
            f"concentration {options.concentration:g}."
        ),
        (
            "Every slot is always taken (closed loop)"
            if rate is None
            else f"{rate:g} requests arrive per second (Poisson) and wait for a slot"
        )
        + f", outputs of {Load(slots=1).tokens} tokens on the average; prefill costs "
        f"nothing; {rounds} rounds of each number of users at least.",
    ]


def stated(path: str | None) -> dict[str, list[float]]:
    """Acceptance by domain and position: of a file, or the constants.

    Raises:
      ValueError: the file holds no such thing.
    """
    if path is None:
        return {name: [rate] * BLOCK for name, rate in ACCEPTANCE.items()}
    try:
        curves = json.loads(pathlib.Path(path).read_text())
        curves = {name: [float(x) for x in rates] for name, rates in curves.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: holds no acceptance by domain ({error})") from error
    lengths = {len(rates) for rates in curves.values()}
    inside = all(0 <= x <= 1 for rates in curves.values() for x in rates)
    if len(lengths) != 1 or 0 in lengths or not inside:
        raise ValueError(
            f"{path}: expected rates between 0 and 1, as many of each "
            f"domain, got {curves}"
        )
    return curves


def stated_trace(options: StatedOptions) -> Trace:
    """Rounds of stated acceptance."""
    curves = stated(options.acceptance)
    return Trace.stated(curves, concentration=options.concentration)


def ladder(slots: int, block_length: int) -> list[int]:
    """Token buckets in steps of a tenth, and one for every fixed length."""
    full = slots * (block_length + 1)
    count = int(np.ceil(np.log(full) / np.log(1.1))) + 1
    steps = np.ceil(1.1 ** np.arange(count)).astype(int)
    blocks = {slots * (length + 1) for length in range(block_length + 1)}
    return sorted({int(step) for step in steps if step < full} | blocks)


def roofline_policies(
    machine: Machine, block: Trace, options: StatedOptions
) -> dict[str, Policy]:
    """V4-Flash on a machine, with drafts of some acceptance."""
    length = block.survival_NG.shape[1]
    single = block.first(1)
    if options.mtp_acceptance is not None:
        rates = {"all": [options.mtp_acceptance]}
        single = Trace.stated(rates, concentration=options.concentration)

    def costs(slots, drafter, lengths, overhead):
        return roofline_costs(
            machine,
            V4_FLASH,
            drafter,
            requests=slots,
            sizes=ladder(slots, length),
            draft_lengths=lengths,
            draft_overhead=overhead,
        )

    def dspark(slots):
        return costs(slots, DSPARK, range(length + 1), 0.5e-3)

    def mtp(slots):
        return costs(slots, MTP, range(2), 0.15e-3)

    def fixed(k: int) -> Policy:
        return lambda n: (block, Fixed(k), dspark(n))

    def scheduled(slots: int) -> tuple[Trace, Scheduler, Costs]:
        known = dspark(slots)
        return block, Lagged(costs=known), known

    policies: dict[str, Policy] = {
        "no speculation": lambda n: (single, Fixed(0), mtp(n)),
        "MTP-1": lambda n: (single, Fixed(1), mtp(n)),
    }
    for k in sorted({min(k, length) for k in (2, 3, length)}):
        policies[f"DSpark-{k}, fixed"] = fixed(k)
    return policies | {f"DSpark-{length}, scheduled": scheduled}
