"""What scheduling remembers between rounds."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from jaxspark.decoding import Causal, Fixed, Lagged
from jaxspark.decoding.schedule_state import (
    ScheduleState,
    extend_survival,
    recall,
    remembered,
)
from tests import zoo


def test_survival_that_was_not_drafted_falls_as_it_last_did():
    past = jnp.array([[[0.8, 0.4, 0.2], [0.4, 0.2, 0.1]]] * 2)
    seen = extend_survival(jnp.array([[0.5], [0.2]]), past)
    np.testing.assert_allclose(seen, [[0.5, 0.25, 0.125], [0.2, 0.1, 0.05]], rtol=1e-6)
    # The guess is remembered, and the next one is the same.
    again = extend_survival(jnp.array([[0.9], [0.9]]), seen[None])
    np.testing.assert_allclose(again[0], [0.9, 0.45, 0.225], rtol=1e-6)
    # One round in which nothing was proposed does not end it, and from nothing but
    # such rounds nothing follows.
    blank = jnp.zeros((1, 2, 3))
    for before, tail in ((jnp.concatenate([past, blank]), 0.5), (blank, 1.0)):
        after = extend_survival(jnp.array([[0.6]] * 2), before)
        np.testing.assert_allclose(
            after[0], [0.6, 0.6 * tail, 0.6 * tail**2], rtol=1e-6
        )


def test_rounds_before_the_first_are_like_the_usual_or_like_the_others():
    played = [[[0.8, 0.4], [-1.0, -1.0]], [[0.4, 0.2], [-1.0, -1.0]]]
    past = jnp.array([*played, [[-1.0, -1.0]] * 2])
    # Each slot's blocks take turns: slot 0 would have them at 0, 2 and 4, modulo 3.
    usual = jnp.arange(12.0).reshape(2, 3, 2) / 12
    seen = recall(past, usual)
    np.testing.assert_allclose(seen[:2, 0], past[:2, 0])
    np.testing.assert_allclose(seen[2, 0], usual[0, 1])
    np.testing.assert_allclose(seen[:, 1], usual[1][jnp.array([1, 0, 2])])
    mean = recall(past, None)
    np.testing.assert_allclose(mean[:2, 0], past[:2, 0])
    np.testing.assert_allclose(mean[2], [[0.6, 0.3]] * 2, rtol=1e-6)
    np.testing.assert_allclose(recall(past[2:], None), 1.0)


def test_few_slots_remember_more_rounds():
    rounds = {slots: remembered(slots) for slots in (1, 3, 8, 64, 1000)}
    assert rounds == {1: 64, 3: 22, 8: 8, 64: 8, 1000: 8}


def test_a_schedule_takes_the_seconds_that_are_remembered():
    costs = zoo.costs((2, 8), (2.0, 3.0), plain=1.0, length=3)
    state = ScheduleState.empty(2, 3, seconds=[1.0, 1.1, 1.2])
    likely = state.forecast(jnp.full((1, 2, 3), 0.9), live_B=jnp.ones((2,), bool))
    since = jnp.zeros((2, 3), jnp.int32)
    for seconds, length in (([1.0, 1.1, 1.2], 3), ([1.0, 90.0, 99.0], 0)):
        state = replace(state, seconds_BJ=jnp.tile(jnp.array(seconds), (2, 1)))
        # Nothing of it is lost when requests come.
        state = state.admit(
            jnp.array([0]),
            min_drafts_N=jnp.array([0]),
            max_drafts_N=jnp.array([3]),
            same_temperature_N=jnp.array([True]),
        )
        for kind in (Lagged, Causal):
            informed = state.informed(kind(costs=costs))
            index = int(informed.draft(likely, since))
            assert informed.draft_lengths(3)[index] == length
        assert state.informed(Fixed(2)) == Fixed(2)
    plain = ScheduleState.empty(2, 3)
    assert plain.informed(Lagged(costs=costs)) == Lagged(costs=costs)


def test_those_who_wait_for_a_round_count_as_well():
    """Two slots of four decode: half a draft more each, for 1.4 times as long."""
    costs = zoo.costs((4, 8), (1.4, 1.4), plain=1.0, length=3)
    state, live = ScheduleState.empty(4, 3), jnp.arange(4) < 2
    survival = jnp.tile(jnp.array([0.5, 0.0, 0.0]), (1, 4, 1))
    since = jnp.zeros((4, 3), jnp.int32)
    for reading, drafts in ((0, 3), (1, 0), (2, 0)):
        seen = state.forecast(survival, live_B=live, reading=reading)
        for kind in (Lagged, Causal):
            schedule = kind(costs=costs)
            index = int(schedule.draft(seen, since))
            assert schedule.draft_lengths(3)[index] == drafts


def test_rounds_leave_what_they_saw_to_the_slots_that_took_part():
    state = ScheduleState.empty(2, 3)
    live = jnp.array([True, False])
    survival = jnp.array([[0.5, 0.25], [0.9, 0.8]])
    earlier = jnp.broadcast_to(jnp.array([0.8, 0.4, 0.2]), (4, 2, 3))
    drafted = state.after_drafts(survival, earlier, live)
    np.testing.assert_allclose(drafted.history_BnG[0, 0], [0.5, 0.25, 0.125], rtol=1e-6)
    assert jnp.all(drafted.history_BnG[0, 1:] == -1) and jnp.all(
        drafted.history_BnG[1] == -1
    )
    rested = drafted.after_none()
    assert rested.rounds_since_BG.tolist() == [[1, 1, 2]] * 2
    np.testing.assert_array_equal(rested.history_BnG, drafted.history_BnG)
