"""Log-probabilities that are told are the model's own, at every place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspark.decoding import AdjustmentLimits, DecodeOptions, likeliest
from jaxspark.generation import ContinuousBatch, Request, SamplingParams, generate
from jaxspark.generation.adjusting import adjustment_of
from jaxspark.generation.generate import as_requests
from jaxspark.models import FlatTokens
from tests import zoo
from tests.checkpoints import tiny

WIDTH = 96
TOLD = {"log_probs": True, "top_log_probs": 4, "prompt_log_probs": 2}
WISHES = {
    "temperature": 0.9,
    "frequency_penalty": 1.0,
    "repetition_penalty": 1.5,
    "logit_bias": {3: 4.0},
    "min_tokens": 5,
    "bad_words": [[7]],
}


pytestmark = pytest.mark.usefixtures("compiled_soon")


@jax.jit
def of_one_pass(model, rows_1Q):
    tokens = FlatTokens.from_rows(rows_1Q, jnp.zeros(1, int), jnp.array([WIDTH]))
    x_TD, _, _ = model(tokens, model.init_cache(1, WIDTH))
    return jax.nn.log_softmax(model.logits(x_TD))


def model_log_probs(model, tokens):
    """Of the token after each one, from one pass over all."""
    rows_1Q = np.zeros((1, WIDTH), np.int32)
    rows_1Q[0, : len(tokens)] = tokens
    return np.asarray(of_one_pass(model, rows_1Q))


def assert_likely(told, log_probs_V):
    best = np.argsort(-log_probs_V, kind="stable")[: len(told)]
    np.testing.assert_array_equal([token for token, _ in told], best)
    np.testing.assert_allclose([x for _, x in told], log_probs_V[best], atol=1e-4)


def assert_told(model, request, completion):
    """What a completion tells is what one pass over its text gives."""
    prompt, tokens = list(request.prompt), completion.tokens
    log_probs_TV = model_log_probs(model, prompt + tokens)
    top, of_prompt = completion.top_log_probs, completion.prompt_log_probs
    assert len(top) == len(tokens) and len(of_prompt) == len(prompt)
    for row, token in enumerate(tokens, len(prompt) - 1):
        own = completion.log_probs[row - len(prompt) + 1]
        np.testing.assert_allclose(own, log_probs_TV[row, token], atol=1e-4)
        likely = top[row - len(prompt) + 1]
        assert len(likely) == request.params.top_log_probs
        assert_likely(likely, log_probs_TV[row])
    assert of_prompt[0] is None
    for row, token in enumerate(prompt[1:]):
        told = of_prompt[row + 1]
        np.testing.assert_allclose(told.log_prob, log_probs_TV[row, token], atol=1e-4)
        assert told.rank == 1 + np.sum(log_probs_TV[row] > log_probs_TV[row, token])
        assert len(told.top) == request.params.prompt_log_probs
        assert_likely(told.top, log_probs_TV[row])


@pytest.mark.parametrize("coupling", ["gumbel", "rejection"])
def test_they_are_those_of_one_pass_whatever_was_accepted(coupling):
    """Also inside of blocks, and whatever was done to the logits."""
    model = zoo.target()
    requests = [
        Request(prompt, max_new_tokens=20, seed=i, **TOLD, **(WISHES if i else {}))
        for i, prompt in enumerate(zoo.prompts(1, 17, 30))
    ]
    drafter = zoo.drafter("ngram", model)
    seen = generate(model, requests, drafter, coupling=coupling, block_length=3)
    assert any(each.accepted_length > 1.2 for each in seen)
    for request, completion in zip(requests, seen):
        assert_told(model, request, completion)


def test_a_ring_is_as_long_as_it_must_be():
    """Prompts in chunks, slots taken over, few rounds between two looks."""
    model = zoo.target()
    batch = ContinuousBatch(
        model,
        zoo.drafter("ngram", model),
        slots=2,
        capacity=WIDTH,
        options=DecodeOptions(coupling="gumbel", block_length=3),
        log_probs=True,
        top_log_probs=5,
        prompt_log_probs=True,
        chunk=8,
        rounds_per_step=2,
    )
    assert batch._state.likeliest.ids_BRX.shape == (2, 2 * 4 + 8, 5)
    asked = [
        Request(prompt, max_new_tokens=30, seed=i, **TOLD | {"top_log_probs": i})
        for i, prompt in enumerate(zoo.prompts(41, 1, 9, 26), 2)
    ]
    for each in asked:
        batch.submit(each)
    told, done = {}, {}
    while not batch.idle:
        for update in batch.step():
            if update.prompt_log_probs is not None:
                assert update.tokens and update.index not in told
                told[update.index] = list(update.prompt_log_probs)
            if update.completion:
                done[update.index] = update.completion
    for index, request in enumerate(asked):
        assert told[index] == done[index].prompt_log_probs
        assert_told(model, request, done[index])


def test_a_small_vocabulary_has_no_more_than_all_its_tokens():
    model = zoo.target()
    logits_TV = jnp.array([[0.0, 2.0, 2.0, -1.0]])
    values, ids = likeliest.best(logits_TV, 6)
    assert ids[0, :4].tolist() == [1, 2, 0, 3] and np.isneginf(values[0, 4:]).all()
    [whole] = generate(
        *(model, [[1, 2]]), max_new_tokens=1, log_probs=True, top_log_probs=20
    )
    assert len(whole.top_log_probs[0]) == 20
    assert whole.prompt_log_probs is None


def test_texts_are_bad_words_at_the_beginning_and_behind_a_space():
    target = tiny.target()
    n, o, space = target.tokenizer.encode("no ", add_special_tokens=False)
    params = SamplingParams(bad_words=[" no", [o], "no"])
    found = adjustment_of(params, target, ())
    assert found.bad_words == ((n, o), (space, n, o), (o,))
    # Other white space is a word like any other, and so are spaces alone.
    params = SamplingParams(bad_words=["\n", "  ", "\tn"])
    line, tab = (target.tokenizer.encode(each)[0] for each in "\n\t")
    assert adjustment_of(params, target, ()).bad_words == (
        *((line,), (space, line)),
        (space, space),
        *((tab, n), (space, tab, n)),
    )
    asked = {"max_new_tokens": 6, "stop_ids": (), "allowed_ids": [n, o]}
    asked["logit_bias"] = {n: 100.0}
    assert generate(target, ["x"], **asked)[0].text == "nnnnnn"
    assert generate(target, ["x"], **asked, bad_words=["nn"])[0].text == "nonono"
    limits = AdjustmentLimits(exclusions=True, biases=4)
    with pytest.raises(ValueError, match="bad_words of several tokens"):
        generate(target, ["x"], **asked, bad_words=["nn"], adjustments=limits)


def test_lists_are_for_all_prompts_or_one_each():
    model = zoo.target()
    asked = {"max_new_tokens": 4, "allowed_ids": [3, 4], "bad_words": [[4]]}
    seen = generate(model, [[1], [2]], **asked, logit_bias=[{3: 1.0}, None])
    assert [each.tokens for each in seen] == [[3] * 4] * 2
    each = as_requests([[1], [2]], named={"allowed_ids": [[5], [6]]})
    assert [request.params.allowed_ids for request in each] == [[5], [6]]
