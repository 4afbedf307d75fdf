"""Accepted length: how many tokens a drafter gains per pass of the target.

A round yields the accepted drafts and one token more, which is counted. Looping outputs
are easy to draft, so figures are given with and without them. Conditional acceptance of
place j is the share accepted among drafts that were verified with all earlier ones
accepted (the paper's Figure 2): a block drafter without a sequential head decays there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from jaxspark.decoding import Calibration, DecodeOptions
from jaxspark.decoding.couplings import Coupling
from jaxspark.decoding.schedule import Fixed, Scheduler, Threshold
from jaxspark.drafters import Drafter
from jaxspark.generation import Completion, Request, SamplingParams, generate_stream
from jaxspark.generation.generate import capacity_for
from jaxspark.target import Target
from jaxspark.text.looping import is_looping


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """What decoding some prompts showed.

    Attributes:
      accepted_length: tokens per round.
      accepted_length_non_looping: the same without looping outputs; NaN if all loop.
      conditional_acceptance: by place in the block; NaN where nothing was verified.
      acceptance_rate: accepted drafts per verified one; NaN where none was.
      verified_length: drafts verified per round.
      outputs: prompts decoded.
      looping: how many of them loop.
      tokens: tokens written.
      rounds: target passes.
    """

    accepted_length: float
    accepted_length_non_looping: float
    conditional_acceptance: list[float]
    acceptance_rate: float
    verified_length: float
    outputs: int
    looping: int
    tokens: int
    rounds: int

    @classmethod
    def of(cls, completions: Sequence[Completion]) -> "Acceptance":
        """The figures of some completions."""
        straight = [each for each in completions if not is_looping(each.tokens)]
        reached = [sum(column) for column in zip(*(c.reached for c in completions))]
        accepted = [sum(column) for column in zip(*(c.accepted for c in completions))]
        rounds = sum(each.rounds for each in completions)
        verified = sum(each.verified for each in completions)
        return cls(
            accepted_length=_length(completions),
            accepted_length_non_looping=_length(straight),
            conditional_acceptance=[_ratio(a, r) for a, r in zip(accepted, reached)],
            acceptance_rate=_ratio(sum(accepted), verified),
            verified_length=_ratio(verified, rounds),
            outputs=len(completions),
            looping=len(completions) - len(straight),
            tokens=sum(len(each.tokens) for each in completions),
            rounds=rounds,
        )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def _length(completions: Sequence[Completion]) -> float:
    rounds = sum(each.rounds for each in completions)
    return _ratio(sum(len(each.tokens) for each in completions), rounds)


def measure_acceptance(
    target,
    drafter: Drafter,
    domains: Mapping[str, Sequence[Sequence[int]]],
    *,
    block_length: int | None = None,
    temperature: float = 0.0,
    max_new_tokens: int = 128,
    slots: int = 8,
    coupling: Coupling = "rejection",
    schedule: Scheduler = Fixed(),
    calibration: Calibration | None = None,
    seed: int = 0,
) -> dict[str, Acceptance]:
    """Decodes the prompts of every domain, many at a time.

    Args:
      target: a loaded `Target`, or a bare model.
      drafter: whose drafts are counted.
      domains: prompts as token ids, by domain.
      block_length: drafts per round; None takes the drafter's most.
      temperature: 0 is greedy.
      max_new_tokens: per prompt.
      slots: prompts decoded together; changes no distribution.
      coupling: "rejection" or "gumbel".
      schedule: chooses what is verified.
      calibration: of the drafter's confidences.
      seed: of sampling.
    """
    names = [name for name, prompts in domains.items() for _ in prompts]
    prompts = [prompt for each in domains.values() for prompt in each]
    requests = [
        Request(
            prompt,
            SamplingParams(
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=(seed + index) % 2**32,
            ),
        )
        for index, prompt in enumerate(prompts)
    ]
    block = drafter.block_length if block_length is None else block_length
    stop_ids = Target.of(target).stop_ids
    found: dict[str, list[Completion]] = {name: [] for name in domains}
    for index, completion in generate_stream(
        target,
        requests,
        drafter,
        slots=slots,
        capacity=capacity_for(prompts, max_new_tokens, block),
        options=DecodeOptions(
            block_length=block,
            coupling=coupling,
            schedule=schedule,
            calibration=calibration,
            # What a threshold admits does not depend on buckets; one compiles fastest.
            buckets=(slots * (block + 1),) if isinstance(schedule, Threshold) else None,
        ),
        max_stop_ids=max(1, len(stop_ids)),
    ):
        if completion.error is not None:
            raise ValueError(completion.error)
        found[names[index]].append(completion)
    return {name: Acceptance.of(each) for name, each in found.items()}


def macro_average(values: Sequence[float]) -> float:
    """Mean over domains that have a value."""
    known = [value for value in values if value == value]
    return fmean(known) if known else float("nan")
