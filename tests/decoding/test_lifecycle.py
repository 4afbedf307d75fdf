"""Slots: admitted, prefilled in place by chunks, decoded, finished, released."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspark.decoding import (
    Admission,
    DecodeOptions,
    DecodeState,
    Phase,
    Sampling,
    admit,
    decode,
    prefill,
    release,
)
from jaxspark.generation import generate
from tests import zoo

SLOTS, CAPACITY, NEW, CHUNK = 3, 128, 12, 8
PROMPTS = zoo.prompts(33, 5, 1)


@pytest.fixture(scope="module", params=["hybrid", "eagle3"])
def pair(request):
    model = zoo.target()
    return model, zoo.drafter(request.param, model)


@pytest.fixture(scope="module")
def expected(pair):
    return [each.tokens for each in generate(pair[0], PROMPTS, max_new_tokens=NEW)]


def empty(pair, slots=SLOTS):
    return DecodeState.empty(
        *pair, slots=slots, capacity=CAPACITY, block_length=zoo.BLOCK
    )


def admitted(state, slots, prompts):
    limits = [len(prompt) + NEW for prompt in prompts]
    admission = Admission.of(state, prompts, limits, Sampling.of(len(prompts)))
    return admit(state, jnp.array(slots, jnp.int32), admission)


def phases(state):
    return [Phase(phase) for phase in np.asarray(state.phase_B)]


def output(state, slot, prompt):
    return np.asarray(state.tokens_BS)[slot, len(prompt) : state.lengths_B[slot]]


def prefilled(pair, state, chunks=None, together=None):
    """Some of its slots, by so many chunks; all of it where nothing is said."""
    if together is None:
        return prefill(*pair, state, chunk=CHUNK)
    chunks = jnp.int32(2**30 if chunks is None else chunks)
    return prefill(*pair, state, chunks, chunk=CHUNK, together=together)


def decoded(pair, state, rounds=2**30, finished=SLOTS + 1):
    """One program, whatever is asked for."""
    options = DecodeOptions(block_length=zoo.BLOCK)
    bounds = jnp.int32(rounds), jnp.int32(finished)
    return decode(*pair, state, *bounds, options=options)


def test_a_slot_has_one_phase_at_a_time(pair, expected):
    state = empty(pair)
    assert phases(state) == [Phase.EMPTY] * 3
    state = admitted(state, [2, 0], PROMPTS[1:])
    # One token is the anchor: there is nothing to prefill.
    assert phases(state) == [Phase.DECODING, Phase.EMPTY, Phase.PREFILLING]
    state = prefilled(pair, state)
    assert phases(state) == [Phase.DECODING, Phase.EMPTY, Phase.DECODING]
    assert state.processed_B.tolist() == [0, 0, 4]
    state = decoded(pair, state)
    assert phases(state) == [Phase.FINISHED, Phase.EMPTY, Phase.FINISHED]
    assert output(state, 2, PROMPTS[1]).tolist() == expected[1]
    assert output(state, 0, PROMPTS[2]).tolist() == expected[2]
    state = release(state, jnp.array([True, False, False]))
    assert phases(state) == [Phase.EMPTY, Phase.EMPTY, Phase.FINISHED]
    assert state.lengths_B.tolist() == [0, 0, 5 + NEW]


def test_newcomers_are_prefilled_between_the_rounds_of_others(pair, expected):
    """A long prompt advances by chunks; neither it nor the others notice."""
    state = admitted(empty(pair), [1], PROMPTS[1:2])
    state = prefilled(pair, state)
    state = admitted(decoded(pair, state, 1), [0], PROMPTS[:1])
    steps = 0
    while Phase.PREFILLING in phases(state):
        state = prefilled(pair, state, chunks=1, together=1)
        steps += 1
        assert int(state.processed_B[0]) == min(CHUNK * steps, 32)
        state = decoded(pair, state, 1)
    assert steps == 4
    state = decoded(pair, state)
    for slot in (0, 1):
        assert output(state, slot, PROMPTS[slot]).tolist() == expected[slot]


def test_few_slots_are_prefilled_at_a_time(pair, expected):
    state = admitted(empty(pair), [0, 1, 2], PROMPTS)
    state = prefilled(pair, state, together=1)
    assert phases(state) == [Phase.DECODING, Phase.PREFILLING, Phase.DECODING]
    state = prefilled(pair, state, together=2)
    state = decoded(pair, state)
    for slot, prompt in enumerate(PROMPTS):
        assert output(state, slot, prompt).tolist() == expected[slot]


def test_a_host_says_whose_prompts_are_read(pair, expected):
    state = admitted(empty(pair), [0, 1, 2], PROMPTS)
    for reading, together in (([1], 1), ([2], 2), ([0], SLOTS)):
        reading_B = jnp.isin(jnp.arange(SLOTS), jnp.array(reading))
        before = state.processed_B.tolist()
        state = prefill(
            *pair, state, jnp.int32(1), reading_B, chunk=CHUNK, together=together
        )
        for slot, prompt in enumerate(PROMPTS):
            gained = int(state.processed_B[slot]) - before[slot]
            left = len(prompt) - 1 - before[slot]
            assert gained == (min(CHUNK, left) if slot in reading else 0)
    state = decoded(pair, prefilled(pair, state))
    for slot, prompt in enumerate(PROMPTS):
        assert output(state, slot, prompt).tolist() == expected[slot]


def test_decoding_returns_once_enough_slots_are_finished(pair):
    state = empty(pair)
    limits = [len(prompt) + n for prompt, n in zip(PROMPTS, (1, 30, 60))]
    admission = Admission.of(state, PROMPTS, limits, Sampling.of(3))
    state = prefilled(pair, admit(state, jnp.arange(3), admission))
    for count in (1, 2, 3):
        state = decoded(pair, state, finished=count)
        assert int(jnp.sum(state.finished_B)) == count


def test_a_slot_that_is_taken_over_forgets_its_request(pair, expected):
    state = prefilled(pair, admitted(empty(pair), [0], PROMPTS[:1]))
    state = decoded(pair, state, 2)
    # Cancelled in the middle, and taken over by a shorter one.
    state = admitted(release(state, jnp.arange(3) == 0), [0], PROMPTS[1:2])
    state = decoded(pair, prefilled(pair, state))
    assert output(state, 0, PROMPTS[1]).tolist() == expected[1]
    assert int(state.counters.rounds_B[0]) <= NEW


def test_slots_outside_an_admission_stay_bit_for_bit(pair):
    state = prefilled(pair, admitted(empty(pair), [1], PROMPTS[:1]))
    before = jax.device_get(state)
    state = admitted(state, [0, SLOTS], PROMPTS[1:])
    after = jax.device_get(prefilled(pair, state, together=2))
    for name in ("tokens_BS", "lengths_B", "processed_B", "phase_B", "limits_B"):
        old, new = getattr(before, name), getattr(after, name)
        np.testing.assert_array_equal(old[1:], new[1:])
    rows = slice(0, 32)
    for old, new in zip(before.target_cache, after.target_cache):
        np.testing.assert_array_equal(old.k_BKSH[1, :, rows], new.k_BKSH[1, :, rows])


def test_an_empty_state_may_be_made_under_jit(pair):
    made = jax.jit(lambda: empty(pair))()
    assert jax.tree.map(jax.typeof, made) == jax.tree.map(jax.typeof, empty(pair))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[]]}, "prompt 0 is empty"),
        ({"prompts": []}, "0 prompts"),
        ({"prompts": [[1.5]]}, "prompt 0 must be whole numbers"),
        ({"limits": [500]}, "capacity of 128 positions cannot hold 500 tokens"),
        ({"limits": [1]}, "prompt 0 has 2 tokens, more than its limit 1"),
        ({"stop_ids": [[1, 2]]}, "2 stop ids for prompt 0, the state has room for 1"),
        ({"stop_ids": [[1], [2]]}, "1 prompts, but stop_ids for 2"),
        ({"min_drafts": 3, "max_drafts": 2}, "0 <= min_drafts <= max_drafts <= 8"),
        ({"max_drafts": 9}, "0 <= min_drafts <= max_drafts <= 8"),
        ({"min_drafts": [1, 2]}, "min_drafts must be a whole number or 1 of them"),
        ({"min_drafts": 0.5}, "min_drafts must be a whole number or 1 of them"),
    ],
    ids=str,
)
def test_impossible_admissions_are_refused(pair, change, message):
    good = {"prompts": [[1, 2]], "limits": [9], "sampling": Sampling.of(1)}
    with pytest.raises(ValueError, match=message):
        Admission.of(empty(pair), **good | change)


def test_a_state_has_slots(pair):
    with pytest.raises(ValueError, match="at least 1 slot, got 0"):
        empty(pair, slots=0)


def test_rewinding_decodes_the_same_tokens_again(pair):
    state = prefilled(pair, admitted(empty(pair), [0, 1, 2], PROMPTS))
    lengths_B = jnp.array(state.lengths_B)
    state = decoded(pair, state, 3)
    first = [output(state, slot, prompt) for slot, prompt in enumerate(PROMPTS)]
    counters = jax.tree.map(jnp.zeros_like, state.counters)
    again = replace(state.rewind(lengths_B), counters=counters)
    again = decoded(pair, again, 3)
    for slot, prompt in enumerate(PROMPTS):
        seen = output(again, slot, prompt)
        shared = min(len(seen), len(first[slot]))
        assert shared and seen[:shared].tolist() == first[slot][:shared].tolist()
