r"""Simulates serving: throughput of all users against the speed of one.

  python -m launch.simulate --json_out=results/simulated_v4_flash.json
  python -m launch.simulate --trace=runs/calibration/test_rejection_1.npz \
      --costs=costs.json --draft=dspark

Without --trace: DeepSeek-V4-Flash on 8 GPUs and on a TPU slice, from a roofline and
stated acceptance; every assumption is printed and kept in the file. With it: rounds
recorded by launch.calibrate against measured costs of launch.profile_cost, one for each
number of slots. Nothing it prints was measured.
"""

from dataclasses import asdict

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from jaxspark.calibration.profile import load_profiles
from jaxspark.calibration.rounds import Rounds
from jaxspark.decoding import Costs, Fixed, Lagged
from jaxspark.decoding.costs import draft_ladder
from jaxspark.evaluation.plots import plot_frontier
from jaxspark.evaluation.roofline import Machine, Network, roofline_costs
from jaxspark.evaluation.simulate import Load, Simulated, Trace, simulate, speed_at
from launch import common
from launch.progress import bars

flags.DEFINE_list(
    "users", [str(2**n) for n in range(11)], "Requests decoded together (closed loop)."
)
flags.DEFINE_float(
    "rate",
    None,
    "Requests per second that arrive by chance and queue for a slot; by default every "
    "slot is always taken.",
)
flags.DEFINE_integer("rounds", 400, "Rounds of each simulation.", lower_bound=20)
flags.DEFINE_float(
    "concentration",
    2.0,
    "Sharpness of stated acceptance: chances of drafts follow Beta distributions of "
    "this concentration; the smaller, the more confidences tell.",
    lower_bound=0.01,
)
flags.DEFINE_float(
    "mtp_acceptance",
    None,
    "Acceptance of MTP-1's draft; by default that of DSpark's first.",
    lower_bound=0.0,
    upper_bound=1.0,
)
flags.DEFINE_string("trace", None, "Rounds recorded by launch.calibrate.")
flags.DEFINE_string("costs", None, "Costs measured by launch.profile_cost.")
flags.DEFINE_string("draft", None, "Calibrate --trace as this drafter's confidences.")
flags.DEFINE_float("temperature", 1.0, "The trace's, for its calibration.")
flags.DEFINE_enum(
    "coupling", "rejection", ["rejection", "gumbel"], "The trace's, for the same."
)
flags.DEFINE_string("json_out", None, "File for the figures; a PNG goes beside it.")
FLAGS = flags.FLAGS

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
# One expert of one layer: three 4096 x 2048 matrices, 4 bits and their scales.
EXPERT = 3 * 4096 * 2048 * 0.53
HEAD = 129280 * 4096 * 2
V4_FLASH = Network(
    name="DeepSeek-V4-Flash, FP8 and FP4 experts",
    dense_bytes=11.8e9,
    experts=256,
    experts_per_token=6,
    expert_bytes=43 * EXPERT,
    active=13.8e9,
    cache_bytes=13.2e6,
)
MTP = Network(
    name="its MTP-1 module",
    dense_bytes=0.17e9 + HEAD,
    experts=256,
    experts_per_token=6,
    expert_bytes=EXPERT,
    active=0.87e9,
    cache_bytes=75e3,
)
DSPARK = Network(
    name="its DSpark drafter, 3 layers",
    dense_bytes=0.63e9 + HEAD,
    experts=256,
    experts_per_token=6,
    expert_bytes=3 * EXPERT,
    active=1.5e9,
    cache_bytes=225e3,
)
BLOCK = 5
FEWEST_SLOT_ROUNDS = 40_000
# Conditional acceptance of every place: no suffix decay. The values give accepted
# lengths of 5.3, 3.8 and 2.9 at block 7, as published for math, chat and poetry.
ACCEPTANCE = {"math": 0.875, "chat": 0.77, "poetry": 0.67}
ASSUMPTIONS = (
    "A pass takes an overhead plus the slower of memory traffic and arithmetic; both "
    "reach 60 % of the chips' peak (H100: 3.35 TB/s, 1979 TFLOP/s in FP8; v5p: 2.765 "
    "TB/s, 918 TOP/s in 8 bits, v5p-16 are 8 chips).",
    "Overhead of a target pass: 4 ms (launches and communication of 43 layers; a round "
    "without drafts took 4.3 ms in published runs on 8 B200), of the DSpark drafter "
    "0.5 ms, of MTP-1 0.15 ms, in proportion to layers, plus the sequential head.",
    "Weights are read once per pass; of 256 routed experts those that its tokens reach "
    "when each chooses 6 evenly. Experts are balanced over chips.",
    "Cache read per request and pass: 13.2 MB (context 8192, 21 CSA layers with 512 "
    "chosen entries, 20 HCA layers, window 128).",
    "Acceptance given all drafts before: 0.875, 0.77, 0.67 for a third of the requests "
    "each, at every place; MTP-1's only draft as often as DSpark's first, unless "
    "--mtp_acceptance says else.",
    "Confidences are calibrated; a draft's chance follows a Beta distribution around "
    "the mean (--concentration).",
    "Closed loop, outputs of 500 tokens on the average; prefill costs nothing.",
)


def frontiers(
    console: Console, title: str, policies: dict, users: list[int]
) -> dict[str, dict[str, Simulated]]:
    """For every policy, what each number of users sees.

    `policies` maps a name to a function of the number of users that gives trace,
    schedule and costs.
    """
    found: dict[str, dict[str, Simulated]] = {}
    with bars(console, transient=True) as progress:
        task = progress.add_task(title, total=len(policies) * len(users))
        for name, policy in policies.items():
            found[name] = {}
            for slots in users:
                trace, schedule, costs = policy(slots)
                # A single user sees many requests, one after the other.
                rounds = max(FLAGS.rounds, FEWEST_SLOT_ROUNDS // slots)
                load = Load(slots=slots, rate=FLAGS.rate)
                point = simulate(trace, schedule, costs, load, rounds=rounds)
                found[name][str(slots)] = point
                progress.advance(task)
    return found


def ladder(slots: int, block_length: int) -> list[int]:
    """Token buckets in steps of a tenth, and one for every fixed length."""
    full = slots * (block_length + 1)
    count = int(np.ceil(np.log(full) / np.log(1.1))) + 1
    steps = np.ceil(1.1 ** np.arange(count)).astype(int)
    blocks = {slots * (length + 1) for length in range(block_length + 1)}
    return sorted({int(step) for step in steps if step < full} | blocks)


def stated_policies(machine: Machine) -> dict:
    """V4-Flash on a machine, from stated acceptance and the roofline."""

    def trace(places, acceptance=None):
        curves = {
            name: [rate if acceptance is None else acceptance] * places
            for name, rate in ACCEPTANCE.items()
        }
        return Trace.stated(curves, concentration=FLAGS.concentration)

    block, single = trace(BLOCK), trace(1, FLAGS.mtp_acceptance)

    def costs(slots, drafter, lengths, overhead):
        return roofline_costs(
            machine,
            V4_FLASH,
            drafter,
            requests=slots,
            sizes=ladder(slots, BLOCK),
            draft_lengths=lengths,
            draft_overhead=overhead,
        )

    def dspark(slots):
        return costs(slots, DSPARK, range(BLOCK + 1), 0.5e-3)

    def mtp(slots):
        return costs(slots, MTP, range(2), 0.15e-3)

    return {
        "no speculation": lambda n: (single, Fixed(0), mtp(n)),
        "MTP-1": lambda n: (single, Fixed(1), mtp(n)),
        **{
            f"DSpark-{k}, fixed": lambda n, k=k: (block, Fixed(k), dspark(n))
            for k in (2, 3, BLOCK)
        },
        "DSpark-5, scheduled": lambda n: (block, Lagged(costs=dspark(n)), dspark(n)),
    }


def recorded_policies() -> tuple[dict, list[int]]:
    """Our own rounds against measured costs; users are those costs were measured for.

    Raises:
      ValueError: --costs is missing, or its blocks are not the trace's.
    """
    if not FLAGS.costs:
        raise ValueError("--trace needs --costs (see launch.profile_cost)")
    rounds = Rounds.load(FLAGS.trace)
    calibration = common.find_calibration() if FLAGS.draft else None
    trace = Trace.recorded(rounds, calibration, FLAGS.temperature)
    length = trace.survival_NG.shape[1]
    costs: dict[int, Costs] = {}
    for profile in load_profiles(FLAGS.costs):
        if profile.setting.block_length != length:
            raise ValueError(
                f"{FLAGS.costs}: costs of blocks of {profile.setting.block_length}, "
                f"the trace has blocks of {length}"
            )
        costs[profile.setting.slots] = profile.costs

    policies = {
        "no speculation": lambda n: (trace, Fixed(0), costs[n]),
        **{
            f"fixed {k}": lambda n, k=k: (trace, Fixed(k), costs[n])
            for k in draft_ladder(length)[1:]
        },
        "scheduled": lambda n: (trace, Lagged(costs=costs[n]), costs[n]),
    }
    return policies, sorted(costs)


def report(console: Console, title: str, found: dict) -> None:
    """Tokens per second of all users, and of one."""
    table = Table(title=f"{title} · simulated · tokens/s of all (of one)")
    table.add_column("users", justify="right")
    for name in found:
        table.add_column(name, justify="right")
    for users in next(iter(found.values())):
        cells = (each[users] for each in found.values())
        table.add_row(
            users, *(f"{c.throughput:,.0f} ({c.user_speed:.0f})" for c in cells)
        )
    scheduled = list(found.values())[-1]
    table.add_section()
    verified = [f"{each.verified_length:.1f}" for each in scheduled.values()]
    console.print(table)
    console.print(f"verified per request, scheduled: {' '.join(verified)}")


def gains(found: dict, over: str, of: str) -> dict[str, float]:
    """How much faster one user is at the throughput another policy reaches."""
    frontier = list(found[of].values())
    result = {}
    for users, point in found[over].items():
        speed = speed_at(point.throughput, frontier)
        if speed is not None:
            result[users] = speed / point.user_speed - 1
    return result


def main() -> None:
    """Simulates, prints, writes."""
    console = Console()
    if FLAGS.trace:
        policies, users = recorded_policies()
        settings = {FLAGS.trace: policies}
    else:
        users = [int(each) for each in FLAGS.users]
        settings = {m.name: stated_policies(m) for m in MACHINES}
        for line in ASSUMPTIONS:
            console.print(f"- {line}", highlight=False)
    figures: dict[str, dict] = {"simulated": True}
    if not FLAGS.trace:
        figures["assumptions"] = list(ASSUMPTIONS)
        figures["machines"] = {m.name: asdict(m) for m in MACHINES}
        figures["networks"] = {n.name: asdict(n) for n in (V4_FLASH, MTP, DSPARK)}
    curves = {}
    for title, policies in settings.items():
        found = frontiers(console, title, policies, users)
        report(console, title, found)
        curves[title] = found
        figures[title] = {
            name: {users: asdict(each) for users, each in points.items()}
            for name, points in found.items()
        }
        if "MTP-1" in found:
            gain = gains(found, "MTP-1", "DSpark-5, scheduled")
            figures[title]["speed_gain_over_mtp_1_at_its_throughput"] = gain
            line = ", ".join(f"{100 * g:+.0f} % ({u} users)" for u, g in gain.items())
            console.print(f"{title}, simulated: speed of a user against MTP-1: {line}")
    if FLAGS.json_out:
        common.write_figures(FLAGS.json_out, figures)
        plot_frontier(FLAGS.json_out.removesuffix(".json") + ".png", curves)


if __name__ == "__main__":
    common.run(main)
