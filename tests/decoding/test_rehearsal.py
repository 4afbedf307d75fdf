"""Rounds that are led into a branch take that one, whatever the schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspark.decoding import (
    Causal,
    CostCurve,
    Costs,
    DecodeOptions,
    Fixed,
    Free,
    Lagged,
    Sampling,
    Threshold,
    decode,
    init_state,
    prefill,
)
from jaxspark.decoding.costs import guessed_costs
from jaxspark.decoding.rehearsal import lead
from jaxspark.decoding.round import decode_round
from tests import zoo

SLOTS, BLOCK = 3, 4
COSTS = Costs(
    (
        CostCurve(0, (3,), (1.0,)),
        CostCurve(1, (4, 6), (1.4, 1.5)),
        CostCurve(4, (4, 8, 15), (1.6, 1.7, 1.9)),
    )
)
SCHEDULES = {
    "fixed": Fixed(),
    "threshold": Threshold(0.5),
    "causal": Causal(costs=COSTS),
    "lagged": Lagged(costs=COSTS),
    "free": Free(costs=COSTS),
    # What an engine begins with.
    "guessed": Lagged(costs=guessed_costs(SLOTS, BLOCK)),
}


def admitted(target, drafter, **sampling):
    """A request in every slot, none of whose prompts is read."""
    return init_state(
        target,
        drafter,
        zoo.prompts(5, 6, 7, seed=3),
        [40] * SLOTS,
        Sampling.of(SLOTS, **sampling),
        block_length=BLOCK,
        capacity=64,
    )


@pytest.mark.parametrize(
    "name",
    [
        "fixed",
        "lagged",
        "guessed",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("threshold", "causal", "free")
        ),
    ],
)
def test_rounds_take_the_branch_that_they_are_led_into(name):
    target = zoo.target()
    drafter = zoo.drafter("dspark-vanilla", target)
    schedule = SCHEDULES[name]
    buckets = (4, 8, 15) if schedule.costs is None else None
    options = DecodeOptions(
        block_length=BLOCK, coupling="gumbel", schedule=schedule, buckets=buckets
    ).resolve(drafter, SLOTS)
    state = admitted(target, drafter, temperature=1.0, seed=range(SLOTS))
    state = prefill(target, drafter, state, chunk=8)
    lengths = state.lengths_B.tolist()
    branches = options.branches(SLOTS)
    count = 9 if name == "guessed" else 6
    assert len(branches) == (3 if schedule.costs is None else count)
    programs = set()
    for length, size in branches:
        before = state.counters
        before = [np.array(each) for each in (before.drafted_B, before.verified_B)]
        state = lead(state, lengths, draft_length=length, size=size)
        assert state.lengths_B.tolist() == lengths
        state = decode(target, drafter, state, jnp.int32(1), options=options)
        drafted_B = np.array(state.counters.drafted_B) - before[0]
        verified_B = np.array(state.counters.verified_B) - before[1]
        assert drafted_B.tolist() == [length > 0] * SLOTS
        assert SLOTS + verified_B.sum() == max(size, SLOTS)
        assert verified_B.max() <= length
        programs.add(decode._cache_size())
    assert len(programs) == 1, "led states are of a type of their own"


@pytest.mark.parametrize(
    ("coupling", "passes"),
    [("gumbel", [3, 4, 6, 8, 15]), ("rejection", [3, 4, 4, 6, 8, 15])],
)
def test_draft_lengths_share_the_second_half_of_their_rounds(
    coupling, passes, monkeypatch
):
    target = zoo.target()
    drafter = zoo.drafter("dspark-vanilla", target)
    options = DecodeOptions(
        block_length=BLOCK, coupling=coupling, schedule=Lagged(costs=COSTS)
    ).resolve(drafter, SLOTS)
    state = admitted(target, drafter)
    sizes, run = [], type(target).__call__

    def counted(self, tokens, *args, **options):
        sizes.append(len(tokens.ids_T))
        return run(self, tokens, *args, **options)

    monkeypatch.setattr(type(target), "__call__", counted)
    jax.eval_shape(lambda: decode_round(target, drafter, state, options))
    assert sorted(sizes) == passes


def test_a_bucket_for_a_few_leaves_the_others_out():
    target = zoo.target()
    drafter = zoo.drafter("dspark-vanilla", target)
    state = admitted(target, drafter)
    led = lead(
        prefill(target, drafter, state, chunk=8),
        [5, 6, 7],
        draft_length=BLOCK,
        size=2,
    )
    assert led.live_B.tolist() == [True, True, False]
