"""The simulator: rounds replayed against a cost curve."""

import numpy as np
import pytest

from jaxspark.calibration.rounds import Rounds
from jaxspark.decoding import Calibration, Causal, CostCurve, Costs, Fixed, Lagged
from jaxspark.simulation.roofline import Machine, Network, roofline_costs
from jaxspark.simulation.simulate import Load, Simulated, Trace, simulate, speed_at
from tests import zoo

FLAT = zoo.costs((4, 8, 20), (1.0, 1.0, 1.0), plain=1.0, length=4)
STEEP = zoo.costs((4, 8, 20), (1.5, 2.5, 5.5), plain=1.0, length=4)
LOAD = Load(slots=4, tokens=100)
ENDLESS = Load(slots=4, tokens=10**6)


def trace(acceptance, **options):
    return Trace.stated({"all": [acceptance] * 4}, concentration=2.0, **options)


def test_without_drafts_a_round_gives_each_slot_a_token():
    seen = simulate(trace(0.9), Fixed(0), STEEP, LOAD)
    assert seen.throughput == pytest.approx(4.0)
    assert seen.user_speed == pytest.approx(1.0)
    assert (seen.accepted_length, seen.verified_length, seen.drafted) == (1, 1, 0)


@pytest.mark.parametrize("length", [1, 4])
def test_drafts_that_are_always_right_are_all_gained(length):
    seen = simulate(trace(1 - 1e-9), Fixed(length), FLAT, ENDLESS)
    assert seen.accepted_length == pytest.approx(length + 1)
    assert seen.throughput == pytest.approx(4 * (length + 1))


def test_accepted_length_follows_from_acceptance():
    seen = simulate(trace(0.7), Fixed(), FLAT, ENDLESS, rounds=4000)
    expected = sum(0.7**k for k in range(5))
    assert seen.accepted_length == pytest.approx(expected, rel=0.03)


def test_the_schedule_verifies_all_that_is_free_and_nothing_that_is_dear():
    free = simulate(trace(0.8), Lagged(costs=FLAT), FLAT, LOAD)
    assert free.verified_length == pytest.approx(5)
    dear = simulate(trace(0.3), Lagged(costs=STEEP), STEEP, LOAD, rounds=1000)
    plain = simulate(trace(0.3), Fixed(0), STEEP, LOAD, rounds=1000)
    assert dear.drafted < 0.05
    assert dear.throughput > 0.97 * plain.throughput


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.85])
def test_schedules_keep_up_with_every_fixed_length(acceptance):
    costs = zoo.costs(
        (4, 6, 8, 12, 16, 20), (1.2, 1.3, 1.45, 1.8, 2.2, 2.6), plain=1.0, length=4
    )

    def throughput(schedule):
        drafts = trace(acceptance)
        return simulate(drafts, schedule, costs, LOAD, rounds=600).throughput

    best = max(throughput(Fixed(k)) for k in range(5))
    for kind in (Lagged, Causal):
        assert throughput(kind(costs=costs)) > 0.97 * best, kind


def test_the_schedule_drafts_as_much_as_pays():
    by_length = {0: 1.0, 1: 1.2, 4: 1.9}
    costs = Costs(
        tuple(CostCurve(g, (4 * (g + 1),), (cost,)) for g, cost in by_length.items())
    )
    for acceptance, best in ((0.1, 0), (0.4, 1), (0.9, 4)):
        drafts = trace(acceptance)
        rates = {
            g: simulate(drafts, Fixed(g), costs, LOAD, rounds=500).throughput
            for g in by_length
        }
        assert max(rates, key=rates.get) == best
        seen = simulate(drafts, Lagged(costs=costs), costs, LOAD, rounds=500)
        assert seen.throughput > 0.97 * rates[best]
        # One token and one percent of whole blocks, to see whether more would pay.
        assert seen.verified_length == pytest.approx(1 + best, abs=0.25)


def test_requests_that_arrive_by_chance_leave_slots_empty():
    load = Load(slots=4, rate=0.01, tokens=100)
    seen = simulate(trace(0.5), Fixed(0), STEEP, load, rounds=4000)
    # A token each second, a hundred per request: one slot is busy on the average, and
    # all that is asked for is delivered.
    assert seen.busy == pytest.approx(1.0, rel=0.3)
    assert seen.throughput == pytest.approx(seen.busy)
    assert seen.user_speed == pytest.approx(1.0)


def test_a_trace_of_fewer_drafts_is_the_same_rounds():
    whole = trace(0.8, requests=3, rounds=5)
    first = whole.first(2)
    np.testing.assert_array_equal(first.survival_NG, whole.survival_NG[:, :2])
    np.testing.assert_array_equal(first.right_N, np.minimum(whole.right_N, 2))


def test_recorded_rounds_are_replayed_whole():
    rounds = Rounds(
        request_N=np.array([0, 1, 0, 1]),
        confidence_NG=np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 0.0], [3.0, 3.0]]),
        certainty_NG=np.zeros((4, 2)),
        judged_N=np.array([2, 1, 1, 2]),
        accepted_N=np.array([2, 0, 1, 1]),
    )
    # The third round was cut after one accepted draft: the second is unknown.
    seen = Trace.recorded(rounds)
    assert seen.right_N.tolist() == [2, 0, 1]
    assert seen.begin_R.tolist() == [0, 1] and seen.count_R.tolist() == [1, 2]
    np.testing.assert_allclose(seen.survival_NG[0], [0.8808, 0.4404], atol=1e-4)
    flat = Calibration(coupling="gumbel", fitted_at=(0.7,), temperatures=((2.0, 1.0),))
    hot = Trace.recorded(rounds, flat)
    np.testing.assert_allclose(hot.survival_NG[0, 0], 0.7311, atol=1e-4)


def test_rounds_that_never_verified_a_block_are_refused():
    cut = Rounds(
        request_N=np.zeros(1, int),
        confidence_NG=np.zeros((1, 3)),
        certainty_NG=np.zeros((1, 3)),
        judged_N=np.array([1]),
        accepted_N=np.array([1]),
    )
    with pytest.raises(ValueError, match="no recorded round verified its whole block"):
        Trace.recorded(cut)


def test_a_round_keeps_within_the_largest_bucket():
    narrow = zoo.costs((4, 7), (1.0, 1.0), plain=1.0, length=4)
    seen = simulate(trace(0.9), Fixed(), narrow, LOAD)
    assert seen.verified_length == pytest.approx(7 / 4)


def test_costs_must_hold_the_slots():
    with pytest.raises(ValueError, match="costs end at 4 tokens, 64 slots"):
        simulate(trace(0.5), Fixed(0), FLAT, Load(slots=64))


# The roofline --------------------------------------------------------------------

MACHINE = Machine(
    name="one", chips=2, bandwidth=1e12, flops=1e14, efficiency=0.5, overhead=1e-3
)
MIXTURE = Network(
    name="moe",
    dense_bytes=1e9,
    experts=16,
    experts_per_token=2,
    expert_bytes=1e9,
    active=1e9,
    cache_bytes=1e6,
)


def test_a_pass_reads_the_experts_its_tokens_reach():
    one, many = MIXTURE.seconds(MACHINE, np.array([1, 10_000]), 1)
    assert one == pytest.approx(1e-3 + (1e9 + 2e9 + 1e6) / 1e12)
    # Ten thousand tokens reach all experts, and arithmetic takes longer still.
    assert many == pytest.approx(1e-3 + 2e9 * 10_000 / 1e14)


def test_roofline_costs_never_fall_and_count_the_drafter():
    costs = roofline_costs(
        MACHINE,
        MIXTURE,
        MIXTURE,
        requests=2,
        sizes=(2, 4, 12),
        draft_lengths=(0, 5),
        draft_overhead=2e-4,
    )
    without, drafted = costs.curves
    assert list(drafted.seconds) == sorted(drafted.seconds)
    plain, draft = MIXTURE.seconds(MACHINE, np.array([2, 10]), 2)
    assert without.seconds == pytest.approx([plain])
    assert drafted.seconds[0] == pytest.approx(plain + draft - 1e-3 + 2e-4)


def test_speed_is_compared_at_one_throughput():
    def point(throughput, speed):
        rest = dict(accepted_length=1, verified_length=1, drafted=1, busy=1)
        return Simulated(throughput=throughput, user_speed=speed, **rest)

    frontier = [point(10, 10), point(20, 5), point(30, 3)]
    assert speed_at(15, frontier) == pytest.approx(7.5)
    assert speed_at(25, frontier) == pytest.approx(4)
    assert speed_at(31, frontier) is None
