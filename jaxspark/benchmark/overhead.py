"""`jaxspark bench --suite=overhead`: what scheduling and packing cost.

Two measurements at one number of slots. An ablation: rounds that verify every draft,
once because a schedule with calibrated confidences and many buckets chose so, once
compiled for nothing else, and once while acceptance is learned too. And the parts
alone, many times in a loop, against the time of such a round: decisions and packing,
the entropies that confidences look at, and learning.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from statistics import median

import jax
import jax.numpy as jnp
from rich.console import Console

from jaxspark.benchmark.load import LoadOptions
from jaxspark.benchmark.prefilled import Contestant, PrefilledBatch
from jaxspark.configuration import option
from jaxspark.decoding import (
    Calibration,
    CostCurve,
    Costs,
    DecodeOptions,
    Estimator,
    Fixed,
    Forecast,
    Lagged,
    decode,
)
from jaxspark.decoding.compiling import compiled
from jaxspark.decoding.costs import bucket_ladder, draft_ladder, within_ladder
from jaxspark.decoding.couplings import entropy
from jaxspark.decoding.logistic import Prior
from jaxspark.decoding.options import check_block_length
from jaxspark.decoding.schedule_state import remembered
from jaxspark.drafters import Drafter
from jaxspark.models import FlatTokens
from jaxspark.settings import random_key
from jaxspark.timing import alternate, medians, timed

ROUNDS, TIMES = 2, 200
# Learns in full, in every run, yet believes nothing: every draft stays worth it.
UNMOVED = Estimator(
    every=ROUNDS,
    prior=Prior(mean=(1.0, 0.0, 0.0), precision=(1e9, 1e9, 1e9), place_precision=1e9),
)


@dataclass(frozen=True, kw_only=True)
class OverheadOptions(LoadOptions):
    """How overhead is measured."""

    overhead_slots: int = option("Slots of --suite=overhead.", 64, at_least=1)


@partial(jax.jit, static_argnames=("schedule", "calibration", "sizes"))
def _decide(
    schedule, calibration, sizes, confidence_BG, certainty_BG, temperature_B, past_nBG
):
    """Survival, schedule and packing, `TIMES` times; the sum keeps all of it."""
    slots, block_length = confidence_BG.shape
    rows_BQ = jnp.zeros((slots, block_length + 1), jnp.int32)

    def body(step, total):
        survival_BG = calibration.survival(
            confidence_BG + 1e-6 * total, certainty_BG, temperature_B
        )
        # All inputs change from time to time, or the compiler would decide but once.
        current = Forecast.of(survival_BG)
        lagged = Forecast.of(past_nBG + 1e-6 * total)
        drafts = schedule.draft(lagged, jnp.zeros((slots, block_length), jnp.int32))
        lengths_B = schedule(current, lagged, sizes).lengths_B
        tokens = FlatTokens.from_rows(
            rows_BQ, jnp.full((slots,), step), lengths_B + 1, capacity=sizes[-1]
        )
        packed = tokens.positions_T + tokens.slots_T + tokens.ids_T
        return total + jnp.sum(packed) % 7 + drafts

    return jax.lax.fori_loop(0, TIMES, body, jnp.float32(0))


@jax.jit
def _certainty(log_q_GBW):
    """Entropies of one round's drafts, `TIMES` times."""

    def body(_, total):
        return total + jnp.sum(entropy(log_q_GBW - 1e-9 * total))

    return jax.lax.fori_loop(0, TIMES, body, jnp.float32(0))


@jax.jit
def _learn(confidence_BG, certainty_BG):
    """Forecasts of a round, and what is learned from it, `TIMES` times."""
    estimator = Estimator()
    slots, block_length = confidence_BG.shape
    sampled_B = jnp.ones((slots,), bool)

    def body(step, carry):
        state, total = carry
        moved_BG = confidence_BG + 1e-6 * total
        logits_BG = state.logits(moved_BG, certainty_BG, sampled_B)
        judged_B = 1 + (step + jnp.arange(slots)) % block_length
        state = state.observed(
            estimator,
            confidence_BG=moved_BG,
            certainty_BG=certainty_BG,
            sampled_B=sampled_B,
            judged_B=judged_B,
            accepted_B=judged_B - 1,
        )
        return state, total + jnp.sum(logits_BG)

    start = estimator.empty(slots, block_length), jnp.float32(0)
    return jax.lax.fori_loop(0, TIMES, body, start)[1]


def bench_overhead(
    console: Console,
    target,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    options: OverheadOptions,
) -> dict:
    """Seconds of rounds with and without, and of the parts alone."""
    block_length = check_block_length(drafter, None)
    slots = options.overhead_slots
    sizes = bucket_ladder(slots, block_length)
    batch = PrefilledBatch(
        target.model,
        drafter,
        list(islice(cycle(prompts), slots)),
        rounds=options.load_rounds,
        capacity=options.capacity,
        temperature=options.load_temperature,
    )
    # Where tokens cost nothing, everything is verified.
    curves = []
    for length in draft_ladder(block_length):
        fitting = within_ladder(sizes, slots * (length + 1))
        curves.append(CostCurve(length, fitting, (1.0,) * len(fitting)))
    free = Costs(tuple(curves))
    # Computed in full, yet it moves no confidence near 0: every draft stays worth it.
    ones, zeros = ((1.0,) * block_length,), ((0.0,) * block_length,)
    calibration = Calibration(
        coupling="rejection",
        fitted_at=(1.0,),
        temperatures=ones,
        biases=zeros,
        weights=zeros,
    )
    scheduled = DecodeOptions(
        block_length=block_length,
        schedule=Lagged(costs=free),
        calibration=calibration,
    )
    bare = replace(scheduled, schedule=Fixed(), buckets=sizes[-1:], calibration=None)

    estimated = replace(scheduled, estimator=UNMOVED)
    verified: set[int] = set()

    def contestant(decode_options):
        way = Contestant(drafter, decode_options)

        def run():
            state = jax.block_until_ready(batch.start(way, 0))
            begin = time.perf_counter()
            state = compiled(decode)(
                target.model, drafter, state, jnp.int32(ROUNDS), options=decode_options
            )
            jax.block_until_ready(state)
            verified.add(int(state.counters.verified_B.sum()))
            batch.finish(state)
            return (time.perf_counter() - begin) / ROUNDS

        return run

    with console.status(f"{slots} slots, rounds with and without scheduling"):
        contestants = {
            "scheduled": contestant(scheduled),
            "bare": contestant(bare),
            "estimated": contestant(estimated),
        }
        runs = alternate(contestants, options.repeats)
    if len(verified) > 1:
        raise ValueError(f"rounds verified different numbers of drafts: {verified}")
    ratio = median(a / b for a, b in zip(runs["scheduled"], runs["bare"]))
    learning = median(a / b for a, b in zip(runs["estimated"], runs["scheduled"]))
    key = random_key(0)
    inputs = (
        jax.random.normal(key, (slots, block_length)),
        jnp.ones((slots, block_length)),
        jnp.ones((slots,)),
        jax.random.uniform(key, (remembered(slots), slots, block_length)),
    )
    # A hybrid's is its model's; prompt lookup has none.
    config = getattr(getattr(drafter, "model", drafter), "config", None)
    width = getattr(config, "draft_vocab_size", None) or target.model.config.vocab_size
    logits_GBW = jax.random.normal(key, (block_length, slots, width))
    log_q_GBW = jax.nn.log_softmax(logits_GBW)

    parts = {
        "decision": timed(_decide, scheduled.schedule, calibration, sizes, *inputs),
        "certainty": timed(_certainty, log_q_GBW),
        "learning": timed(_learn, *inputs[:2]),
    }
    loops = medians(alternate(parts, options.repeats))
    alone = {name: each / TIMES for name, each in loops.items()}
    seconds, learn = medians(runs), alone.pop("learning")
    figures = {
        "slots": slots,
        "round_seconds": seconds["scheduled"],
        "round_seconds_without": seconds["bare"],
        "overhead_of_rounds": ratio - 1,
        "decision_and_packing_seconds": alone["decision"],
        "certainty_seconds": alone["certainty"],
        "share_of_round": sum(alone.values()) / seconds["bare"],
        "overhead_of_learning": learning - 1,
        "learning_seconds": learn,
        "learning_share_of_round": learn / seconds["bare"],
    }
    console.print(
        f"{slots} slots, {sizes[-1]} tokens: a round takes "
        f"{1e3 * figures['round_seconds']:.1f} ms scheduled, "
        f"{1e3 * figures['round_seconds_without']:.1f} ms without "
        f"({100 * figures['overhead_of_rounds']:+.2f} %, median of pairs); deciding "
        f"and packing alone {1e3 * alone['decision']:.3f} ms, certainty "
        f"{1e3 * alone['certainty']:.3f} ms (both "
        f"{100 * figures['share_of_round']:.2f} %); learning acceptance "
        f"{100 * figures['overhead_of_learning']:+.2f} %, alone {1e3 * learn:.3f} ms "
        f"({100 * figures['learning_share_of_round']:.2f} %)"
    )
    return figures
