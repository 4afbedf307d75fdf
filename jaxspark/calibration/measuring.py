"""Measures what a round costs on the device it will run on.

On the decode loop itself, whole rounds with each bucket in turn, so that all of a round
is counted but the choosing, which costs next to nothing. Lower quartiles of alternating
runs: what disturbs a shared machine only makes runs longer, and their ratios varied by
1.0 % where those of medians varied by 1.7 (four runs, two shared cores). A bucket that
takes as long as a larger one is left out: matrix products have sizes they like, and
costs then rise.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxspark.calibration.profile import CostProfile, Setting
from jaxspark.decoding import (
    CostCurve,
    Costs,
    DecodeOptions,
    Fixed,
    Sampling,
    decode,
    init_state,
    prefill,
)
from jaxspark.decoding.compiling import compiled
from jaxspark.decoding.costs import bucket_ladders
from jaxspark.decoding.couplings import Coupling
from jaxspark.decoding.options import check_block_length
from jaxspark.decoding.rehearsal import lead
from jaxspark.decoding.schedule import CostAware
from jaxspark.drafters import Drafter
from jaxspark.parallel.agreement import agreed
from jaxspark.parallel.mesh import readable, shard, slots_per_shard
from jaxspark.progress import bars
from jaxspark.target import Target
from jaxspark.timing import alternate

# Text of drafters that may skip rounds repeats itself after as many tokens.
_PERIOD = 16
# Rounds that take longer are timed one by one: a call itself takes a hundredth of that.
RUN_S = 0.1


def measure_costs(
    target,
    drafter: Drafter,
    *,
    slots: int,
    block_length: int | None = None,
    buckets: tuple[int, ...] | None = None,
    capacity: int = 512,
    coupling: Coupling = "rejection",
    temperature: float = 1.0,
    rounds: int | None = None,
    repeats: int = 5,
    on_run: Callable[[int, int], None] = lambda done, total: None,
) -> CostProfile:
    """Times rounds of every draft length, with every bucket, in turn.

    Args:
      target: a loaded `Target`, or a bare model.
      drafter: what drafts.
      slots: requests decoded together.
      block_length: drafts per round; None takes the drafter's most.
      buckets: token buckets; None takes a ladder up to every draft.
      capacity: cache positions of each request; half of them are filled.
      coupling: "rejection" or "gumbel".
      temperature: of sampling.
      rounds: rounds per timed run; by default as many as take a tenth of a second, so
        that what a call itself takes does not count, but no more than 16 for one slot,
        fewer for more, 4 if caches hold as many.
      repeats: timed runs of each bucket.
      on_run: called with runs done and runs in all.

    Raises:
      ValueError: the caches have no room for such rounds.
    """
    model, drafter = shard(Target.of(target).model), shard(drafter)
    block_length = check_block_length(drafter, block_length)
    # Token buckets are those of a shard.
    own = slots_per_shard(slots)
    setting = Setting.of(
        target,
        drafter,
        slots=slots,
        block_length=block_length,
        capacity=capacity,
        coupling=coupling,
        sampled=temperature > 0,
    )
    sizes = bucket_ladders(own, block_length, buckets)
    adapt = rounds is None
    if rounds is None:
        # No more than half of the caches can hold.
        fitting = capacity // (2 * (block_length + 1)) - 1
        rounds = max(1, min(max(4, 16 // slots), fitting))
    if drafter.may_skip:
        # Text that repeats itself has something to copy, until a round adds to it.
        rounds = 1
    context = min(capacity // 2, capacity - (rounds + 1) * (block_length + 1))
    if context < 2:
        raise ValueError(
            f"{rounds} rounds of {block_length} drafts need more cache positions than "
            f"{capacity}"
        )
    random = np.random.default_rng(0)
    prompts = random.integers(model.config.vocab_size, size=(slots, context))
    if drafter.may_skip:
        prompts = prompts[:, np.arange(context) % max(min(_PERIOD, context // 2), 1)]
    state = init_state(
        model,
        drafter,
        prompts.tolist(),
        # No slot may end while it is timed.
        [capacity - block_length] * slots,
        Sampling.of(slots, temperature=temperature, seed=range(slots)),
        block_length=block_length,
        capacity=capacity,
    )
    state = prefill(model, drafter, state, chunk=64)
    holder, begun_B = [state], readable(state.lengths_B).tolist()
    total, done = sum(map(len, sizes.values())) * (repeats + 1), [0]

    def contestant(length, size):
        """Rounds that draft so much and fill a bucket with drafts of all slots."""
        options = DecodeOptions(
            block_length=block_length,
            coupling=coupling,
            schedule=Fixed(length),
            buckets=sizes[length],
        )

        def run():
            # Rows past the length are never read: the rounds of a run are undone.
            state = lead(holder[0], begun_B, draft_length=length, size=size)
            jax.block_until_ready(state)
            begin = perf_counter()
            state = compiled(decode)(
                model, drafter, state, jnp.int32(rounds), options=options
            )
            holder[0] = jax.block_until_ready(state)
            done[0] += 1
            on_run(done[0], total)
            return (perf_counter() - begin) / rounds

        return run

    contestants = {
        f"{length} {size}": contestant(length, size)
        for length in sizes
        for size in sizes[length]
    }
    if adapt and rounds > 1:
        longest = list(contestants.values())[-1]
        total += 2
        longest()  # Compiles it.
        [taken] = agreed(np.array([longest()])).tolist()
        rounds = max(1, min(rounds, math.ceil(RUN_S / taken)))
    runs = alternate(contestants, repeats)
    # Buckets follow from these, so the processes of a job take those of one.
    quartiles = agreed(np.array([np.quantile(each, 0.25) for each in runs.values()]))
    seconds = dict(zip(runs, quartiles.tolist()))
    curves = (
        pareto_buckets(length, each, [seconds[f"{length} {size}"] for size in each])
        for length, each in sizes.items()
    )
    return CostProfile(setting=setting, costs=Costs(tuple(curves)))


def pareto_buckets(
    length: int, sizes: Sequence[int], seconds: Sequence[float]
) -> CostCurve:
    """The curve of those buckets that take less time than every larger one."""
    kept: list[tuple[int, float]] = []
    for size, taken in reversed(list(zip(sizes, seconds))):
        if not kept or taken < kept[0][1]:
            kept.insert(0, (size, taken))
    return CostCurve(length, *zip(*kept))


def with_measured_costs(
    options: DecodeOptions,
    target,
    drafter: Drafter,
    *,
    slots: int,
    capacity: int,
    temperature: float = 1.0,
    console: Console | None = None,
) -> DecodeOptions:
    """The options, with costs measured here if their schedule weighs some and has none.

    Measuring takes a while, under a progress bar.

    Args:
      options: how rounds draft, schedule and verify.
      target: a loaded `Target`, or a bare model.
      drafter: what drafts.
      slots: requests decoded together.
      capacity: cache positions of each.
      temperature: of sampling; any above 0 costs the same.
      console: for the progress bar.
    """
    schedule = options.schedule
    if not isinstance(schedule, CostAware) or not schedule.needs_costs:
        return options
    profile = measured_with_progress(
        target,
        drafter,
        console=console,
        slots=slots,
        block_length=options.block_length,
        buckets=options.buckets,
        capacity=capacity,
        coupling=options.coupling,
        temperature=float(temperature > 0),
    )
    return replace(
        options, schedule=replace(schedule, costs=profile.costs), buckets=None
    )


def measured_with_progress(
    target, drafter: Drafter, *, console: Console | None = None, **options
) -> CostProfile:
    """`measure_costs` under a progress bar."""
    with bars(console) as progress:
        title = f"measuring what rounds of {options['slots']} cost"
        task = progress.add_task(title, total=None)
        return measure_costs(
            target,
            drafter,
            **options,
            on_run=lambda done, total: progress.update(
                task, completed=done, total=total
            ),
        )
