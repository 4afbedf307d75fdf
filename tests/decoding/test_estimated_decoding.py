"""The estimator in the loop: it sees what happened, and changes no token."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspark.calibration.estimates import Estimate
from jaxspark.decoding import (
    DecodeOptions,
    DecodeState,
    Estimator,
    Fixed,
    Sampling,
    Threshold,
    decode,
)
from jaxspark.decoding.couplings import NEGENTROPY, ODDS
from jaxspark.drafters import DraftContext
from jaxspark.generation import ContinuousBatch, Request, generate
from jaxspark.parallel.mesh import make_mesh
from tests import zoo

PROMPTS = zoo.prompts(3, 17, 8, 5)
OPTIONS = DecodeOptions(
    block_length=4,
    coupling="gumbel",
    schedule=Threshold(0.2),
    estimator=Estimator(every=2),
)


@pytest.fixture(scope="module")
def model():
    return zoo.target()


def completed(batch, temperatures, new_tokens=24):
    """Everything that comes of the prompts, each at its temperature."""
    for prompt, temperature in zip(PROMPTS, temperatures):
        batch.submit(
            Request(prompt, max_new_tokens=new_tokens, temperature=temperature, seed=7)
        )
    done = {}
    while not batch.idle:
        for update in batch.step():
            if update.completion is not None:
                done[update.index] = update.completion
    return [done[index] for index in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def learned(model):
    """Requests in two slots, and what was learned from them."""
    batch = ContinuousBatch(
        model, zoo.drafter("dflash", model), slots=2, capacity=128, options=OPTIONS
    )
    assert Estimate.of(batch.estimator).calibration_error is None
    return completed(batch, (0.0, 1.0, 0.0, 1.0)), batch.estimator


def test_no_token_changes(model, learned):
    completions, _ = learned
    plain = generate(
        model,
        PROMPTS,
        max_new_tokens=24,
        temperature=[0.0, 1.0, 0.0, 1.0],
        seed=[7] * 4,
        coupling="gumbel",
    )
    assert [c.tokens for c in completions] == [c.tokens for c in plain]


def test_it_remembers_every_draft_that_was_judged(learned):
    completions, state = learned
    places = range(4)
    for name, counted in (("judged_Bn", "reached"), ("accepted_Bn", "accepted")):
        seen_N = np.asarray(getattr(state, name)).ravel()
        total = [sum(getattr(c, counted)[j] for c in completions) for j in places]
        assert [int((seen_N > j).sum()) for j in places] == total
    judged = np.asarray(state.judged_Bn) > 0
    assert {bool(x) for x in np.asarray(state.sampled_Bn)[judged]} == {True, False}


def test_what_was_learned_can_be_told(learned):
    completions, state = learned
    estimate = Estimate.of(state)
    assert estimate.blocks == sum(c.reached[0] for c in completions)
    assert 0 <= estimate.calibration_error < 1
    for shared_X, name in zip(state.shared_BRX[0], ("greedy", "sampled")):
        told = estimate.regressions[name]
        assert told.certainty == pytest.approx(float(shared_X[1]))
        assert told.certainty != 0 and len(set(told.intercepts)) > 1
    for x in (state.shared_BRX, state.places_BRG):
        np.testing.assert_array_equal(x[0], x[1])


@pytest.mark.long
def test_calls_may_be_cut_anywhere(model):
    """Under rejection sampling tokens depend on lengths, so on what was learned."""
    options = replace(OPTIONS, coupling="rejection", schedule=Threshold(0.4))
    seen = []
    for rounds in (1, 5):
        batch = ContinuousBatch(
            model,
            zoo.drafter("dspark-gated", model),
            slots=4,
            capacity=128,
            options=options,
            rounds_per_step=rounds,
        )
        seen.append([c.tokens for c in completed(batch, (1.0,) * 4)])
    assert seen[0] == seen[1]


def test_states_without_room_are_refused(model):
    drafter = zoo.drafter("ngram", model)
    state = DecodeState.empty(model, drafter, slots=1, capacity=32, block_length=4)
    options = replace(OPTIONS, schedule=Fixed()).resolve(drafter, 1)
    with pytest.raises(ValueError, match="the state was made without"):
        decode(model, drafter, state, jnp.int32(1), options=options)


@pytest.mark.parametrize(
    ("coupling", "temperature", "line"),
    [
        ("rejection", 0.0, ODDS),
        ("rejection", 1.0, NEGENTROPY),
        ("gumbel", 1.0, ODDS),
    ],
)
def test_without_a_head_certainty_suggests_confidence(
    model, coupling, temperature, line
):
    from jaxspark.decoding.couplings import CoupledSampler

    drafter = zoo.drafter("eagle3", model)
    sampling = Sampling.of(2, temperature=[temperature, 0.0])
    tokens_BS = jnp.array([PROMPTS[0][:3], PROMPTS[1][:3]])
    lengths_B = jnp.array([2, 3])
    sampler = CoupledSampler(coupling, sampling, lengths_B - 1)
    cache = drafter.init_cache(2, 32)
    proposal, _ = drafter.propose(
        model, cache, DraftContext.of(tokens_BS, lengths_B), sampler, 3
    )
    for slot, (slope, intercept) in enumerate((line, ODDS)):
        np.testing.assert_allclose(
            proposal.confidence_BG[slot],
            slope * proposal.certainty_BG[slot] + intercept,
            rtol=1e-5,
        )


def test_shards_learn_the_same_as_one_device():
    estimator, random = Estimator(every=1, blocks=64), np.random.default_rng(0)
    from jaxspark.parallel.mesh import over_mesh
    from jaxspark.parallel.rules import state_specs

    def by_slot(_):
        return jax.sharding.PartitionSpec(("data", "expert"))

    @jax.jit
    @over_mesh(state_specs, by_slot, by_slot, by_slot, by_slot, out=0)
    def observed(state, confidence_BG, certainty_BG, judged_B, accepted_B):
        return state.observed(
            estimator,
            confidence_BG=confidence_BG,
            certainty_BG=certainty_BG,
            sampled_B=judged_B > 0,
            judged_B=judged_B,
            accepted_B=accepted_B,
        )

    states = [estimator.empty(8, 3), estimator.empty(8, 3)]
    for _ in range(4):
        judged_B = random.integers(0, 4, 8)
        seen = (
            random.normal(size=(8, 3)).astype(np.float32),
            random.normal(size=(8, 3)).astype(np.float32),
            judged_B.astype(np.int32),
            np.maximum(judged_B - random.integers(0, 2, 8), 0).astype(np.int32),
        )
        states[0] = observed(states[0], *map(jnp.asarray, seen))
        with jax.set_mesh(make_mesh("data:4", jax.devices()[:4])):
            states[1] = observed(states[1], *map(jnp.asarray, seen))
    one, four = states
    assert np.abs(np.asarray(one.shared_BRX[0, 1]) - (1, 0, 0)).max() > 0.01
    for a, b in ((one.shared_BRX, four.shared_BRX), (one.places_BRG, four.places_BRG)):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-4)
        # To the last bit on all of them.
        np.testing.assert_array_equal(np.asarray(b), np.asarray(b)[:1].repeat(8, 0))
