"""Schedules inside the compiled round: counted, bounded, skipped and taken up again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspark.calibration import with_measured_costs
from jaxspark.calibration.profile import CostProfile, Setting, find_profile
from jaxspark.decoding import (
    Calibration,
    Causal,
    CostCurve,
    Costs,
    DecodeOptions,
    Fixed,
    Lagged,
    Sampling,
    Threshold,
    decode,
    init_state,
    parse_schedule,
    prefill,
)
from jaxspark.generation import (
    ContinuousBatch,
    Request,
    RequestError,
    generate,
    generate_stream,
)
from tests import zoo

PROMPTS = zoo.prompts(3, 17, 8)
PLAIN = {"max_new_tokens": 40, "temperature": 1.0, "coupling": "gumbel"}
OPTIONS = {"block_length": 4, **PLAIN}


@pytest.fixture(scope="module")
def model():
    return zoo.target()


@pytest.fixture(scope="module")
def plain(model):
    return [each.tokens for each in generate(model, PROMPTS, **PLAIN)]


def run(model, plain, schedule, **options):
    seen = generate(
        model,
        PROMPTS,
        zoo.drafter("dspark-gated", model),
        schedule=schedule,
        **OPTIONS | options,
    )
    assert [each.tokens for each in seen] == plain
    return seen


def costs(draft_seconds, slope=1.0, sizes=(15,)):
    seconds = tuple(1 + draft_seconds + slope * (size - 3) for size in sizes)
    return zoo.costs(sizes, seconds, plain=1.0, length=4)


def test_dear_drafts_are_only_tried_now_and_then(model, plain):
    seen = run(model, plain, Lagged(costs=costs(1.0, sizes=(3, 15)), probe_share=0.1))
    for each in seen:
        assert each.rounds >= 39 and 1 <= each.drafted <= 0.2 * each.rounds


def test_the_usual_is_expected_before_there_is_history(model, plain):
    schedule = Lagged(costs=costs(0.5, slope=0.1), probe_share=1e-4)
    options = {"coupling": "gumbel", "fitted_at": (1.0,)}
    for usual, drafted in ((None, 1), ((((0.01,) * 4,),), 0)):
        calibration = Calibration(
            **options,
            temperatures=((1.0,) * 4,),
            biases=((-4.0,) * 4,),
            prior_blocks=usual,
        )
        seen = run(model, plain, schedule, calibration=calibration)
        assert {each.drafted for each in seen} == {drafted}


def test_requests_begin_with_the_memory_of_those_before_them(model):
    seconds = zoo.costs((5,), (2.5,), plain=1.0, length=4)
    requests = [Request(prompt, max_new_tokens=12) for prompt in PROMPTS]
    # At another temperature, it has nothing to begin with.
    requests.append(Request(PROMPTS[0], max_new_tokens=12, temperature=0.5))
    stream = generate_stream(
        model,
        requests,
        zoo.drafter("dspark-gated", model),
        slots=1,
        capacity=64,
        options=DecodeOptions(
            block_length=4, schedule=Lagged(costs=seconds, probe_share=1e-4)
        ),
    )
    drafted = {index: each.drafted for index, each in stream}
    assert drafted == {0: 1, 1: 0, 2: 0, 3: 1}


def test_drafts_that_cost_nothing_are_all_verified(model, plain):
    seen = run(model, plain, Causal(costs=costs(0.0, slope=0.0, sizes=(3, 15))))
    assert all(each.drafted == each.rounds for each in seen)
    assert sum(e.verified for e in seen) > 3 * sum(e.rounds for e in seen)


def test_short_blocks_are_drafted_where_long_ones_are_dear(model, plain):
    lengths = {0: 5.0, 1: 1.0, 4: 9.0}
    curves = (CostCurve(g, (3 * (g + 1),), (cost,)) for g, cost in lengths.items())
    schedule = Lagged(costs=Costs(tuple(curves)), probe_share=0.4)
    for each in run(model, plain, schedule):
        assert each.drafted == each.rounds
        # A whole block once in twenty rounds, the first of them at the beginning.
        assert each.rounds < each.verified <= 1.6 * each.rounds
        assert each.reached[0] > 10 > each.reached[1]


def test_what_decoding_returns_it_takes_without_compiling_again(model):
    drafter = zoo.drafter("dspark-gated", model)
    options = DecodeOptions(block_length=4, schedule=Fixed(2))
    state = init_state(
        model,
        drafter,
        PROMPTS,
        [60] * 3,
        Sampling.of(3, temperature=1.0),
        block_length=4,
        capacity=64,
    )
    before = jax.tree.map(jax.typeof, state)
    state = prefill(model, drafter, state, chunk=16)
    compiled = decode._cache_size()
    for _ in range(2):
        state = decode(model, drafter, state, jnp.int32(1), options=options)
    assert jax.tree.map(jax.typeof, state) == before
    assert decode._cache_size() == compiled + 1


def test_nothing_is_drafted_with_a_fixed_length_of_none(model, plain):
    assert all(each.drafted == 0 for each in run(model, plain, Fixed(0)))


def test_each_request_keeps_its_bounds_on_drafts(model, plain):
    bounds = {"min_drafts": [0, 2, 1], "max_drafts": [4, 4, 1]}
    seen = run(model, plain, Threshold(1.0), buckets=(15,), **bounds)
    assert seen[0].verified == 0
    # The last rounds have less room.
    assert 2 * (seen[1].rounds - 3) <= seen[1].verified <= 2 * seen[1].rounds
    assert seen[2].rounds - 3 <= seen[2].verified <= seen[2].rounds
    seen = run(model, plain, Fixed(), max_drafts=2)
    assert all(each.verified <= 2 * each.rounds for each in seen)


def test_bounds_on_drafts_say_nothing_of_plain_decoding(model):
    bounds = [{"min_drafts": 2}, {"min_drafts": 1, "max_drafts": 1}, {"max_drafts": 0}]
    asked = [
        Request(prompt, max_new_tokens=8, **each)
        for prompt, each in zip(PROMPTS, bounds)
    ]
    plain = generate(model, PROMPTS, max_new_tokens=8)
    seen = generate(model, asked)
    assert [each.tokens for each in seen] == [each.tokens for each in plain]


def test_mandatory_drafts_need_room_in_a_round(model):
    drafter = zoo.drafter("dspark-gated", model)
    for options, most in ((dict(schedule=Fixed(1)), 1), (dict(buckets=(6,)), 2)):
        options = DecodeOptions(block_length=4, **options)
        batch = ContinuousBatch(model, drafter, slots=2, capacity=64, options=options)
        batch.submit(Request((1,), max_new_tokens=4, min_drafts=most))
        with pytest.raises(
            RequestError, match=rf"min_drafts .*, in 0\.\.{most}; got 3"
        ):
            batch.submit(Request((1,), max_new_tokens=4, min_drafts=3))


def test_calibration_changes_what_is_verified(model, plain):
    """Sure of the first two drafts of every block, and of no other."""
    calibration = Calibration(
        coupling="gumbel",
        fitted_at=(1.0,),
        temperatures=((100.0,) * 4,),
        biases=((9.0, 9.0, -9.0, -9.0),),
    )
    options = {"calibration": calibration, "buckets": (15,)}
    for each in run(model, plain, Threshold(0.9), **options):
        # The last rounds have less room.
        assert 2 * (each.rounds - 2) <= each.verified <= 2 * each.rounds


def test_biases_shift_confidences():
    options = {"coupling": "gumbel", "fitted_at": (0.5, 1.0)}
    rows = {"temperatures": ((1.0, 1.0), (2.0, 2.0))}
    sure = Calibration(**options, **rows, biases=((0.0, 0.0), (50.0, 0.0)))
    seen = sure.survival(jnp.zeros((2, 2)), jnp.ones((2, 2)), jnp.array([0.1, 0.9]))
    np.testing.assert_allclose(seen, [[0.5, 0.25], [1.0, 0.5]], rtol=1e-6)


def test_greedy_requests_are_calibrated_as_greedy_ones_or_not_at_all():
    def survival(fitted_at, sampling):
        made = Calibration(
            coupling="gumbel",
            fitted_at=fitted_at,
            temperatures=((1.0,),) * len(fitted_at),
            biases=tuple((9.0 * t + 1,) for t in fitted_at),
            weights=((1.0,),) * len(fitted_at),
        )
        temperature_B = jnp.array(sampling)
        zeros = jnp.zeros((len(sampling), 1))
        logit = jax.scipy.special.logit(made.survival(zeros, zeros, temperature_B))
        return np.asarray(logit)[:, 0]

    # However near 0 its temperature, a sampled request is no greedy one.
    seen = survival((0.0, 1.0), [0.0, 0.1, 1.0])
    np.testing.assert_allclose(seen, [1.0, 10.0, 10.0], rtol=1e-2)
    np.testing.assert_allclose(survival((1.0,), [0.0, 1.0]), [0.0, 10.0], rtol=1e-2)
    np.testing.assert_allclose(survival((0.0,), [0.0, 1.0]), [1.0, 0.0], rtol=1e-2)


def test_weights_count_sharpness():
    ones = ((1.0, 1.0),)
    counting = Calibration(
        coupling="gumbel", fitted_at=(1.0,), temperatures=ones, weights=((2.0, 0.0),)
    )
    sharp = jnp.array([[0.0, 7.0], [0.5, 0.0]])
    seen = counting.survival(jnp.zeros((2, 2)), sharp, jnp.ones(2))
    first = 1 / (1 + np.exp(-1))
    np.testing.assert_allclose(seen, [[0.5, 0.25], [first, first / 2]], rtol=1e-6)


def calibration(length, coupling="rejection"):
    return Calibration.identity(length, coupling)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": calibration(3)}, "temperatures for 3 drafts, rounds draft 4"),
        ({"calibration": calibration(4, "gumbel")}, "fitted under coupling 'gumbel'"),
    ],
)
def test_calibrations_of_other_rounds_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DecodeOptions(block_length=4, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fitted_at": (1.0, 0.0)}, "ascending"),
        ({"fitted_at": (0.0, 1.0)}, "give one row each"),
        ({"temperatures": ((1.0, -1.0),)}, "must be positive"),
        ({"coupling": "none"}, "unknown coupling 'none'"),
        ({"biases": ((0.0,),)}, r"have \(2,\) numbers, rows of biases \(1,\)"),
        ({"weights": ((0.0,),)}, r"have \(2,\) numbers, rows of weights \(1,\)"),
        (
            {"prior_blocks": (((0.0,),),)},
            "as many blocks of 2 drafts for each of 1 sampling",
        ),
        ({"prior_blocks": ()}, "as many blocks of 2 drafts for each of 1 sampling"),
    ],
)
def test_malformed_calibrations_are_refused(changes, message):
    good = {"coupling": "gumbel", "fitted_at": (1.0,), "temperatures": ((1.0, 2.0),)}
    with pytest.raises(ValueError, match=message):
        Calibration(**good | changes)


def test_costs_are_measured_where_they_are_missing(model, capsys):
    drafter = zoo.drafter("dspark-gated", model)
    size = {"slots": 1, "capacity": 64}
    options = DecodeOptions(block_length=1, schedule=Lagged(), buckets=(2,))
    measured = with_measured_costs(options, model, drafter, **size)
    assert "measuring what rounds of 1 cost" in capsys.readouterr().out
    assert measured.schedule.costs.draft_lengths == (0, 1)
    assert measured.resolve(drafter, 1).sizes(1) == (2,)
    assert with_measured_costs(measured, model, drafter, **size) is measured
    assert not capsys.readouterr().out


def test_a_round_without_costs_says_so():
    with pytest.raises(ValueError, match="Lagged knows no costs"):
        Lagged().known  # noqa: B018


@pytest.mark.parametrize("name", ["device", "target", "slots", "capacity"])
def test_profiles_hold_where_they_were_made(model, name):
    drafter = zoo.drafter("dspark-gated", model)
    options = dict(slots=3, block_length=4, coupling="rejection", sampled=True)
    here = Setting.of(model, drafter, capacity=64, **options)
    profile = CostProfile(setting=here, costs=costs(0.1))
    same = Setting.of(model, drafter, capacity=64, **options)
    assert find_profile([profile], same) is profile
    other = {**vars(here), name: "other"}
    with pytest.raises(ValueError, match=f"made for another {name}: .*, this is 'othe"):
        find_profile([profile], Setting(**other))


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("fixed", Fixed()),
        ("fixed:2", Fixed(2)),
        ("threshold:0.5", Threshold(0.5)),
        ("lagged:2", Lagged(lag=2)),
    ],
)
def test_schedules_have_names(text, schedule):
    assert parse_schedule(text) == schedule


@pytest.mark.parametrize("text", ["", "fixed:x", "causal:1", "threshold", "lagged:0"])
def test_names_of_no_schedule_are_refused(text):
    with pytest.raises(ValueError, match="schedule"):
        parse_schedule(text)
