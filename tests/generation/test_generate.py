"""`generate`: budgets, stops, streaming, log-probabilities, errors."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspark.decoding import (
    DecodeOptions,
    Fixed,
    Lagged,
    Sampling,
    decode_round,
    init_state,
    prefill,
)
from jaxspark.generation import generate
from jaxspark.models import DenseDecoder
from tests import zoo
from tests.driver import Session


@pytest.fixture(scope="module")
def model():
    return zoo.target()


@pytest.fixture(scope="module")
def ngram(model):
    return zoo.drafter("ngram", model)


def step_by_step(model, prompt, count):
    """Greedy decoding with the bare model only; tokens and log-probabilities."""
    session = Session(model, 1, 64)
    row, tokens, log_probs = prompt, [], []
    for _ in range(count):
        [logits], _ = session.feed([row], chunk=1)
        log_p_V = jax.nn.log_softmax(logits[-1])
        tokens.append(int(np.argmax(logits[-1])))
        log_probs.append(float(log_p_V[tokens[-1]]))
        row = tokens[-1:]
    return tokens, log_probs


def test_plain_decoding_is_the_bare_model_step_by_step(model):
    for prompt in zoo.prompts(1, 2, 33):
        [seen] = generate(model, [prompt], max_new_tokens=20, log_probs=True)
        tokens, log_probs = step_by_step(model, prompt, 20)
        assert seen.tokens == tokens
        np.testing.assert_allclose(seen.log_probs, log_probs, atol=1e-5)


def test_log_probs_do_not_change_with_speculation(model, ngram):
    prompts = zoo.prompts(4, 19, 7)
    plain = generate(model, prompts, max_new_tokens=30, log_probs=True)
    fast = generate(model, prompts, ngram, max_new_tokens=30, log_probs=True)
    assert max(each.accepted_length for each in fast) > 1.2
    for a, b in zip(plain, fast):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-4)


@pytest.mark.parametrize("budget", [1, 2, 3, 9, 10, 11])
def test_a_budget_is_met_to_the_token(model, ngram, budget):
    [seen] = generate(model, zoo.prompts(12), ngram, max_new_tokens=budget)
    assert len(seen.tokens) == budget
    assert seen.finish_reason == "length"


def test_each_prompt_may_have_its_own_budget(model, ngram):
    seen = generate(model, zoo.prompts(5, 5, 5), ngram, max_new_tokens=[1, 7, 30])
    assert [len(each.tokens) for each in seen] == [1, 7, 30]


def test_a_stop_token_inside_an_accepted_block_ends_the_output(model, ngram):
    # Prompt lookup drafts a stop token only where the prompt already has it.
    [prompt] = zoo.prompts(12)
    prompt = prompt + generate(model, [prompt], max_new_tokens=40)[0].tokens
    [free] = generate(model, [prompt], ngram, max_new_tokens=40)
    cut = 0
    for stop in set(free.tokens):
        [seen] = generate(model, [prompt], ngram, max_new_tokens=40, stop_ids=(stop,))
        expected = free.tokens[: free.tokens.index(stop) + 1]
        assert seen.tokens == expected
        assert seen.finish_reason == "stop"
        cut += seen.rounds + sum(seen.accepted) > len(seen.tokens)
    assert cut, "no stop token stood before other accepted drafts"


def test_streaming_delivers_the_same_tokens_piece_by_piece(model, ngram):
    prompts = zoo.prompts(3, 20, 5)
    pieces = {0: [], 1: [], 2: []}
    calls = []

    def on_tokens(slot, tokens):
        calls.append(slot)
        pieces[slot] += tokens

    seen = generate(model, prompts, ngram, max_new_tokens=40, on_tokens=on_tokens)
    whole = generate(model, prompts, ngram, max_new_tokens=40)
    assert list(pieces.values()) == [each.tokens for each in seen]
    assert [each.tokens for each in seen] == [each.tokens for each in whole]
    assert len(calls) > 4


def test_counters_add_up(model, ngram):
    [seen] = generate(model, zoo.prompts(12), ngram, max_new_tokens=40)
    assert sum(seen.accepted) + seen.rounds == len(seen.tokens)
    assert all(a <= b for a, b in zip(seen.accepted, seen.reached))
    assert all(a >= b for a, b in zip(seen.accepted, seen.reached[1:]))


def test_a_fixed_schedule_verifies_no_more_than_its_length(model, ngram):
    options = {"schedule": Fixed(2), "buckets": (3,)}
    [seen] = generate(model, zoo.prompts(12), ngram, max_new_tokens=30, **options)
    assert seen.reached[1] > 0
    assert seen.reached[2:] == [0] * (zoo.BLOCK - 2)


def test_the_round_is_pure_inside_a_callers_own_jit(model, ngram):
    prompts = zoo.prompts(6, 11)
    options = DecodeOptions(block_length=3, buckets=(8,))

    @jax.jit
    def two_rounds(model, state):
        def body(_, state):
            return decode_round(model, ngram, state, options)

        return jax.lax.fori_loop(0, 2, body, state)

    state = init_state(model, ngram, prompts, [40, 40], Sampling.of(2), block_length=3)
    state = prefill(model, ngram, state, chunk=16)
    state = two_rounds(model, state)
    expected = generate(model, prompts, max_new_tokens=20)
    for slot, prompt in enumerate(prompts):
        length = int(state.lengths_B[slot])
        seen = np.asarray(state.tokens_BS)[slot, len(prompt) : length].tolist()
        assert 2 <= len(seen) <= 8
        assert seen == expected[slot].tokens[: len(seen)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prompts=[]), "no prompts"),
        (dict(prompts=[[]]), "request 0: the prompt is empty"),
        (dict(prompts=["text"]), "no tokenizer"),
        (dict(prompts=[[3, zoo.VOCAB]]), rf"in 0\.\..*; got {zoo.VOCAB}"),
        (dict(prompts=[[3], [1.7, 2.2]]), "request 1: the prompt: .* got 1.7"),
        (dict(prompts=[[3, 2.0]]), "must be a whole number, .*; got 2.0"),
        (dict(prompts=[[3, True]]), "got True"),
        (dict(prompts=[np.array([3.0])]), "got .*3.0"),
        (dict(prompts=[["3"]]), "got '3'"),
        (dict(prompts=[[-1]]), "got -1"),
        (dict(stop_ids=(2.5,)), "request 0: stop_ids: .* got 2.5"),
        (dict(stop_ids=(1, zoo.VOCAB)), f"stop_ids: .* got {zoo.VOCAB}"),
        (dict(prompts=[[1] * 1020]), "prompt of 1020 tokens and 16 new ones exceed"),
        (dict(prompts=[1, 2, 3]), "request 0: a prompt is text or a list"),
        (dict(max_new_tokens=0), "max_new_tokens must be a whole number, 1 or more"),
        (dict(max_new_tokens=2.5), "max_new_tokens must be a whole number"),
        (dict(top_k=2.5), "top_k must be a whole number"),
        (dict(params=[]), "1 prompts, but params for 0"),
        (dict(temperature=-1.0), r"temperature must lie in \[0,"),
        (dict(temperature=float("nan")), r"temperature must lie in \[0,.* got nan"),
        (dict(temperature="warm"), "temperature must lie in .* got 'warm'"),
        (dict(top_p=0.0), "top_p must be positive"),
        (dict(min_drafts=3, max_drafts=2), r"min_drafts must .* in 0\.\.2; got 3"),
        (dict(min_drafts=-1), r"min_drafts must .* in 0\.\.8; got -1"),
        (dict(max_drafts=-1), "max_drafts must .* 0 or more; got -1"),
        (dict(min_drafts=0.5), "min_drafts must be a whole number, .* got 0.5"),
        (dict(block_length=zoo.BLOCK + 1), "block length 9"),
        (dict(block_length=0), "block length 0"),
        (dict(coupling="hope"), "unknown coupling 'hope'"),
        (dict(buckets=(0,)), "cannot hold one token of each of 1 slots"),
        (dict(buckets=(9, 9)), "ascending"),
        (dict(schedule=Lagged()), "the schedule Lagged weighs costs and has none"),
        (dict(capacity=8), "needs 27 positions .* each slot has 8"),
        (dict(seed=-1), "seed"),
        (dict(seed=1.5), "seed must be a whole number"),
    ],
    ids=str,
)
def test_bad_requests_are_refused_with_the_value_and_the_fix(
    model, ngram, change, message
):
    arguments = dict(prompts=[[1, 2, 3]], drafter=ngram, max_new_tokens=16) | change
    with pytest.raises(ValueError, match=message):
        generate(model, **arguments)


def test_each_prompt_may_have_its_own_stop_tokens(model, ngram):
    [prompt] = zoo.prompts(12)
    [free] = generate(model, [prompt], max_new_tokens=12)
    stops = [(free.tokens[3],), (), (free.tokens[6],)]
    seen = generate(model, [prompt] * 3, ngram, max_new_tokens=12, stop_ids=stops)
    for each, stop in zip(seen, stops):
        end = free.tokens.index(stop[0]) + 1 if stop else 12
        assert each.tokens == free.tokens[:end]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_hidden_layers=3), "num_target_layers is 3, the target's is 2"),
        (dict(vocab_size=99), "vocab_size is 99"),
        (dict(hidden_size=48), "hidden_size is 48"),
    ],
    ids=str,
)
def test_a_drafter_for_another_target_is_refused(model, change, message):
    other = DenseDecoder(replace(model.config, **change), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        generate(model, [[1]], zoo.drafter("dflash", other))


def test_the_callers_sampling_survives_decoding(model, ngram):
    sampling = Sampling.of(1, temperature=0.5)
    state = init_state(model, ngram, [[1, 2]], [8], sampling, block_length=2)
    prefill(model, ngram, state, chunk=16)
    assert float(sampling.temperature[0]) == 0.5


def test_a_state_for_another_block_length_is_refused(model, ngram):
    state = init_state(model, ngram, [[1]], [8], Sampling.of(1), block_length=2)
    with pytest.raises(ValueError, match="draft 3 tokens, the state was made for"):
        decode_round(model, ngram, state, DecodeOptions(block_length=3))


def test_plain_decoding_has_no_block_length(model):
    with pytest.raises(ValueError, match="expected 0..0"):
        generate(model, [[1]], block_length=2)


def test_bfloat16_runs_end_to_end(ngram):
    model = jax.tree.map(lambda w: w.astype(jnp.bfloat16), zoo.target())
    [seen] = generate(model, zoo.prompts(9), ngram, max_new_tokens=8, buckets=(9,))
    assert len(seen.tokens) == 8
