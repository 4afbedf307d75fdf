"""What a request may not ask for is refused, in a stream as in `generate`."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from jaxspark.decoding import Sampling, init_state
from jaxspark.drafters import PlainDrafter
from jaxspark.generation import Request, generate, generate_stream
from tests.checkpoints import tiny

POSITIONS = 128


@pytest.fixture(scope="module")
def target():
    return tiny.target(max_position_embeddings=POSITIONS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 126}, "a prompt of 3 tokens and 126 new ones exceed"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, 1 or more"),
        ({"max_new_tokens": True}, "max_new_tokens must be .* got True"),
        ({"prompt": [1, 2.0, 3]}, "the prompt: a token id must be .* got 2.0"),
        ({"prompt": [1, 300, 3]}, r"in 0\.\.299; got 300"),
        ({"prompt": 7}, "a prompt is text or a list of token ids, got 7"),
        ({"stop_ids": [2.5]}, "stop_ids: a token id .* got 2.5"),
        ({"stop_ids": [-1]}, "stop_ids: a token id .* got -1"),
        ({"stop_ids": range(9)}, "9 stop ids, this batch has room for 8"),
        ({"min_drafts": 0.5}, "min_drafts must be a whole number"),
        ({"log_probs": True}, "log_probs are asked for, this batch keeps none"),
        ({"top_log_probs": 1}, "top_log_probs is 1, and log_probs is not set"),
        ({"top_log_probs": 21}, r"top_log_probs must be .* in 0\.\.20; got 21"),
        ({"prompt_log_probs": 0}, "prompt_log_probs are asked for, this batch keeps"),
        ({"presence_penalty": 2.5}, r"presence_penalty must lie in \[-2, 2\], got 2.5"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty must lie in"),
        ({"repetition_penalty": 0}, "repetition_penalty must be positive, got 0"),
        ({"repetition_penalty": 1.5}, "penalties are asked for, this batch was made"),
        ({"logit_bias": [5]}, "logit_bias must map token ids to numbers"),
        ({"logit_bias": {300: 1}}, r"logit_bias: a token id .* in 0\.\.299; got 300"),
        ({"logit_bias": {5: 101}}, "logit_bias must lie in .* got 101"),
        ({"allowed_ids": [300]}, "allowed_ids: a token id .* got 300"),
        ({"allowed_ids": []}, "allowed_ids, bad_words and min_tokens together leave"),
        ({"bad_words": "no"}, "bad_words must be a list, got 'no'"),
        ({"bad_words": [""]}, "bad_words has an empty entry"),
        ({"bad_words": [3]}, "bad_words has 3; expected texts or lists of token ids"),
        ({"min_tokens": 3}, r"min_tokens must be a whole number, in 0\.\.2; got 3"),
    ],
    ids=str,
)
def test_a_bad_request_ends_nothing_but_itself(target, change, message):
    good = {"prompt": [1, 2, 3], "max_new_tokens": 2}
    requests = [
        Request(**good),
        Request(**(good | change), name="bad"),
        Request(**good),
    ]
    stream = generate_stream(target, requests, slots=2, capacity=256, together=2)
    done = dict(stream)
    assert done[1].finish_reason == "error" and not done[1].tokens
    assert re.match(rf"request 1 \(bad\): .*{message}", done[1].error)
    assert len(done[0].tokens) == len(done[2].tokens) == 2


def test_the_last_position_is_used_and_none_after_it(target):
    request = Request([1, 2, 3], max_new_tokens=POSITIONS - 3, stop_ids=())
    [(_, done)] = generate_stream(target, [request], slots=1, capacity=256)
    assert len(done.tokens) == POSITIONS - 3


@pytest.mark.parametrize("place", [0, 1, "stop_ids"])
def test_a_state_is_not_made_of_numbers_that_are_cut(target, place):
    arguments = [[[1, 2, 3]], [8]]
    options = {"block_length": 1, "stop_ids": [[5]]}
    if place == "stop_ids":
        options[place] = [[5.5]]
    else:
        arguments[place] = [[[1.7]], [8.5]][place]
    with pytest.raises(ValueError, match="must be whole numbers, got"):
        init_state(target.model, PlainDrafter(), *arguments, Sampling.of(1), **options)


def test_text_is_of_whole_ids_alone(target):
    with pytest.raises(TypeError, match="float"):
        target.tokenizer.decode([65.7])


def test_ids_may_be_integers_of_any_kind(target):
    expected = generate(target, [[1, 2, 3]], max_new_tokens=4)[0].tokens
    for prompt in (
        np.array([1, 2, 3], np.uint16),
        [np.int64(1), 2, np.uint8(3)],
        jnp.array([1, 2, 3]),
        (1, 2, 3),
    ):
        [done] = generate(target, [prompt], max_new_tokens=4, stop_ids=np.array([257]))
        assert done.tokens == expected
