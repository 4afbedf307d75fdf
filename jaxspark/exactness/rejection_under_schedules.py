"""Guarantee 2 under schedules: two requests compete, neither's distribution may move.

A schedule is dangerous where a draft decides, through the confidences behind it,
whether it is verified itself (paper, appendix A). The costs here let it: either no
draft is verified or nearly all, and what tips the scales is the second draft's
confidence. One drafter gives away its first token by it. The same checks find a
schedule that chooses by it to be biased.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxspark.decoding import (
    Calibration,
    CostCurve,
    Costs,
    DecodeOptions,
    Estimator,
    Sampling,
    Scheduler,
    decode,
    init_state,
    prefill,
)
from jaxspark.decoding.schedule import CostAware
from jaxspark.decoding.state import DecodeState, Phase
from jaxspark.drafters.base import WithoutContext
from jaxspark.drafters.sequential import draft_block
from jaxspark.exactness.audit_schedules import SCHEDULES, scheduler, spread_confidences
from jaxspark.exactness.enumeration import EnumeratedRound
from jaxspark.exactness.estimated_rounds import CREDULOUS
from jaxspark.exactness.plain_law import sequence_log_probs, target_distribution
from jaxspark.exactness.rejection import PROMPT, Check
from jaxspark.exactness.statistics import chi_square
from jaxspark.exactness.tiny_models import BLOCK_LENGTH, DRAFTERS, Family, tiny_models
from jaxspark.settings import standard_settings

VOCAB = 3
SLOTS = 2
LEAKY = "leaky"
# Three drafts of two requests, or none; two first drafts of 0.8 alone do not pay, where
# four tokens are drafted. Where only two are, they do: next time no more are drafted.
COSTS = Costs(
    (
        CostCurve(0, (SLOTS,), (0.95,)),
        CostCurve(1, (SLOTS, 4), (0.99, 1.68)),
        CostCurve(BLOCK_LENGTH, (SLOTS, 5), (1.0, 2.0)),
    )
)
# More buckets, with less between them.
FINE_COSTS = Costs(
    (
        CostCurve(0, (SLOTS,), (0.95,)),
        CostCurve(1, (SLOTS, 3, 4), (0.99, 1.2, 1.5)),
        CostCurve(BLOCK_LENGTH, (SLOTS, 3, 4, 6), (1.0, 1.35, 1.6, 2.1)),
    )
)


def _neighbour(name: str, state: DecodeState) -> DecodeState:
    """Another second request: done, or with bounds of its own."""
    if name == "done":
        return replace(state, phase_B=jnp.array([Phase.DECODING, Phase.FINISHED]))
    bounded = replace(
        state.schedule,
        min_drafts_B=jnp.array([0, 1]),
        max_drafts_B=jnp.array([BLOCK_LENGTH, 1]),
    )
    return replace(state, schedule=bounded)


NEIGHBOURS = ("done", "bounded")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LeakyDrafter(WithoutContext):
    """Drafts from a fixed distribution; sure of what follows token 0, of nothing else.

    Attributes:
      log_q_V: of every draft, whatever came before.
    """

    log_q_V: Float[Array, " V"]
    block_length: ClassVar[int] = BLOCK_LENGTH
    may_skip: ClassVar[bool] = False

    def propose(self, target, cache, context, sampler, block_length):
        """Each draft's confidence tells the one before it."""
        slots = len(context.lengths_B)
        logits_BV = jnp.broadcast_to(self.log_q_V, (slots, len(self.log_q_V)))

        def step(carry, previous_B, j, _):
            told_B = jnp.where(previous_B == 0, 0.95, 1e-3)
            chance_B = jnp.where(j == 0, 0.8, told_B)
            return carry, logits_BV, jnp.log(chance_B) - jnp.log1p(-chance_B)

        proposal, _ = draft_block(step, (), (), context, sampler, block_length)
        return replace(
            proposal, certainty_BG=jnp.zeros_like(proposal.certainty_BG)
        ), cache


@standard_settings()
def leaky_drafter() -> LeakyDrafter:
    """One for three tokens."""
    return LeakyDrafter(jnp.log(jnp.array([0.4, 0.35, 0.25])))


def schedules_for_rejection() -> dict[str, Scheduler]:
    """All that may be used with it, by name."""
    made = {name: scheduler(name, COSTS) for name in SCHEDULES}
    return {name: each for name, each in made.items() if "rejection" in each.couplings}


@standard_settings()
def enumeration_checks(
    drafters: Sequence[str] | None = None,
    schedules: dict[str, Scheduler] | None = None,
    family: Family = "dense",
) -> list[Check]:
    """A round's distribution under each schedule to 1e-6.

    Without history, after rounds that promise little and after such that promise much;
    then beside requests that are new, done, or bounded otherwise; each with few token
    buckets and with more. How sharp drafts are counts too.
    """
    names = (LEAKY, *DRAFTERS[family]) if drafters is None else drafters
    own = [name for name in names if name != LEAKY]
    target, tried = tiny_models(family, VOCAB, drafters=own)
    sampling = Sampling.of(1, temperature=0.8)
    ones = ((1.0,) * BLOCK_LENGTH,)
    calibration = Calibration(
        coupling="rejection", fitted_at=(1.0,), temperatures=ones, weights=ones
    )
    table = sequence_log_probs(target, PROMPT, BLOCK_LENGTH + 1, sampling)
    expected = target_distribution(table)
    histories = (None, jnp.array([0.5, 0.1]), jnp.array([0.9, 0.8]))
    cases: list[dict] = [{"earlier_G": each} for each in histories]
    cases += [
        {"earlier_G": histories[-1], "altered": partial(_neighbour, each)}
        for each in NEIGHBOURS
    ]
    checks = []
    for name in names:
        drafter = leaky_drafter() if name == LEAKY else spread_confidences(tried[name])
        round_ = EnumeratedRound(target, drafter, [PROMPT, PROMPT[1:]], table, sampling)
        for label, schedule in (schedules or schedules_for_rejection()).items():
            fine = schedule
            if isinstance(schedule, CostAware):
                fine = replace(schedule, costs=FINE_COSTS)
            seen = [
                round_.distribution(each, calibration=calibration, **case)
                for each in {schedule, fine}
                for case in cases
            ]
            error = max(np.abs(each - expected).max() for each in seen)
            checks.append(Check.distance(f"enumeration, {name}, {label}", error))
    return checks


def frequency_checks(
    samples: int,
    schedules: dict[str, Scheduler] | None = None,
    family: Family = "dense",
) -> list[Check]:
    """First two tokens of many pairs of requests: chi-square.

    The whole compiled round with its own random numbers and history, and where
    acceptance is learned from every round; many pairs at once by `vmap`.
    """
    target, _ = tiny_models(family, VOCAB, drafters=())
    exact = target_distribution(
        sequence_log_probs(target, PROMPT, 2, Sampling.of(1, temperature=1.0))
    )
    checks = []
    for label, schedule in (schedules or schedules_for_rejection()).items():
        seeds = np.arange(samples // SLOTS * SLOTS, dtype=np.uint32)
        seeds_NB = seeds.reshape(-1, SLOTS)
        for estimator in (None, CREDULOUS):
            tokens_N2 = _first_two(
                target, leaky_drafter(), seeds_NB, schedule, estimator
            )
            counts = np.zeros((VOCAB, VOCAB), int)
            np.add.at(counts, tuple(np.asarray(tokens_N2).T), 1)
            name = f"first two tokens of {len(seeds)}, {label}"
            name += ", estimator" if estimator else ""
            checks.append(Check.p_value(name, chi_square(counts, exact)))
    return checks


@partial(jax.jit, static_argnames=("schedule", "estimator"))
def _first_two(
    target, drafter, seeds_NB, schedule: Scheduler, estimator: Estimator | None
):
    """Two tokens after the prompt, of all requests."""
    options = DecodeOptions(
        block_length=BLOCK_LENGTH, schedule=schedule, estimator=estimator
    )
    begin = len(PROMPT)
    state = init_state(
        target,
        drafter,
        [PROMPT] * SLOTS,
        [begin + 2 + BLOCK_LENGTH] * SLOTS,
        Sampling.of(SLOTS, temperature=1.0),
        block_length=BLOCK_LENGTH,
        estimator=estimator,
    )
    state = prefill(target, drafter, state, chunk=16)

    def pair(seed_B):
        sampling = replace(state.sampling, seed=seed_B)
        started = replace(state, sampling=sampling)
        ended = decode(target, drafter, started, jnp.int32(2), options=options)
        return ended.tokens_BS[:, begin : begin + 2]

    return jax.vmap(pair)(seeds_NB).reshape(-1, 2)
