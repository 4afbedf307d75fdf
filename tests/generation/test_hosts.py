"""`generate` and `generate_stream` give what plain decoding gives, whatever happens."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxspark.decoding import DecodeOptions
from jaxspark.generation import (
    ContinuousBatch,
    Request,
    SamplingParams,
    generate,
    generate_stream,
)
from tests import zoo

CAPACITY = 96
OPTIONS = DecodeOptions(coupling="gumbel", block_length=3, buckets=(32,))
PROMPTS = zoo.prompts(1, 4, 23)
SHORT = SamplingParams(max_new_tokens=4)


@pytest.fixture(scope="module")
def pair():
    model = zoo.target()
    return model, zoo.drafter("ngram", model)


@pytest.fixture(scope="module")
def plain(pair):
    """Plain decoding of a request alone; remembered."""
    known = {}

    def plain(request):
        key = repr(request)
        if key not in known:
            params = replace(request.params, log_probs=True)
            [known[key]] = generate(
                pair[0],
                [replace(request, params=params)],
                options=DecodeOptions(coupling="gumbel"),
                capacity=CAPACITY,
            )
        return known[key]

    return plain


def requests(log_probs):
    """Requests of few kinds, so that their outputs are soon known."""
    params = st.builds(
        SamplingParams,
        max_new_tokens=st.sampled_from([1, 12]),
        temperature=st.sampled_from([0.0, 1.0]),
        seed=st.just(3),
        stop_ids=st.sampled_from([(), tuple(range(8))]),
        log_probs=log_probs,
        max_drafts=st.sampled_from([None, 1]),
    )
    return st.builds(Request, st.sampled_from(PROMPTS), params)


# Each a fault of its own, and the word that names it.
BAD = [
    (Request([], max_new_tokens=4), "empty"),
    (Request([1, zoo.VOCAB], max_new_tokens=4), "token id"),
    (Request("text", max_new_tokens=4), "tokenizer"),
    (Request([1], max_new_tokens=4, temperature=-1.0), "temperature"),
    (Request([1], max_new_tokens=CAPACITY), "positions"),
    (Request([1], max_new_tokens=4, stop_ids=[0.5]), "stop_ids"),
]
# Three good requests and a bad one among them, one at least with log-probabilities: one
# size of batch is compiled. None lets a request run; a number cancels it once it has as
# many tokens.
entries = st.tuples(
    st.tuples(*map(requests, (st.booleans(), st.just(True), st.booleans()))),
    st.sampled_from([each for each, _ in BAD]),
    st.integers(0, 3),
    st.lists(st.sampled_from([None, 1, 5]), min_size=4, max_size=4),
).map(lambda x: list(zip([*x[0][: x[2]], x[1], *x[0][x[2] :]], x[3])))


def check(completion, request, cancel_at, plain, index):
    fault = next((word for each, word in BAD if each is request), None)
    if fault is not None:
        assert completion.finish_reason == "error" and not completion.tokens
        assert (
            completion.error.startswith(f"request {index}: ")
            and fault in completion.error
        )
        return
    expected = plain(request)
    if completion.finish_reason == "cancelled":
        assert cancel_at is not None and cancel_at <= len(completion.tokens)
        assert completion.tokens == expected.tokens[: len(completion.tokens)]
    else:
        assert completion.tokens == expected.tokens
        assert completion.finish_reason == expected.finish_reason
    assert (completion.log_probs is None) == (not request.params.log_probs)
    if completion.log_probs is not None:
        count = len(completion.tokens)
        assert len(completion.log_probs) == count
        np.testing.assert_allclose(
            completion.log_probs, expected.log_probs[:count], atol=1e-4
        )


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(batch=entries)
def test_generate_and_streams_are_plain_decoding(pair, plain, batch):
    asked = [request for request, _ in batch]
    for run in (_generate, _stream):
        arrived = {index: [] for index in range(len(asked))}

        def on_tokens(index, tokens, arrived=arrived):
            arrived[index] += tokens
            at = batch[index][1]
            return not (at is not None and len(arrived[index]) >= at)

        done = run(pair, asked, on_tokens)
        for index, (request, cancel_at) in enumerate(batch):
            check(done[index], request, cancel_at, plain, index)
            assert arrived[index] == done[index].tokens


def _generate(pair, asked, on_tokens):
    return generate(
        *(pair[0], asked, pair[1]),
        options=OPTIONS,
        capacity=CAPACITY,
        on_tokens=on_tokens,
        errors="return",
    )


def _stream(pair, asked, on_tokens):
    return dict(
        generate_stream(
            *(pair[0], asked, pair[1]),
            slots=2,
            capacity=CAPACITY,
            options=OPTIONS,
            log_probs=True,
            on_tokens=on_tokens,
            rounds_per_step=2,
        )
    )


def test_a_thousand_lives_leak_nothing(pair, plain, random):
    """Slots are taken over, cancelled and released; no request notices another."""
    kinds = [
        Request(
            PROMPTS[i % 3],
            max_new_tokens=[1, 3, 9][i // 3 % 3],
            temperature=float(i % 2),
            seed=i,
            stop_ids=[(), tuple(range(8))][i // 9],
        )
        for i in range(18)
    ]
    batch = ContinuousBatch(
        *pair, slots=8, capacity=CAPACITY, options=OPTIONS, rounds_per_step=2
    )
    asked, lives, cancelled = {}, 0, 0
    while lives < 1000:
        while batch.waiting < 4 and len(asked) < 1000:
            request = kinds[random.integers(len(kinds))]
            asked[batch.submit(request)] = request
        if random.uniform() < 0.3:
            batch.cancel(len(asked) - 1 - int(random.integers(12)))
        for update in batch.step():
            if update.completion is None:
                continue
            lives += 1
            seen, expected = update.completion, plain(asked[update.index])
            cancelled += seen.finish_reason == "cancelled"
            count = len(seen.tokens)
            assert seen.tokens == expected.tokens[:count]
            assert seen.finish_reason in ("cancelled", expected.finish_reason)
            if seen.finish_reason != "cancelled":
                assert count == len(expected.tokens)
    assert batch.idle and batch.free == 8 and cancelled > 20


def test_errors_are_raised_before_anything_is_computed(pair, monkeypatch):
    monkeypatch.setattr(ContinuousBatch, "step", lambda self: pytest.fail("decoded"))
    for request, word in BAD:
        with pytest.raises(ValueError, match=rf"request 1: .*{word}"):
            generate(
                *(pair[0], [PROMPTS[0], request], pair[1]), SHORT, capacity=CAPACITY
            )


def test_one_seed_for_all_is_spread_by_index(pair):
    params = SamplingParams(max_new_tokens=8, temperature=1.0, seed=3)
    first, second = generate(pair[0], [PROMPTS[1]] * 2, params=params)
    assert first.tokens != second.tokens
    own = [replace(params, seed=3)] * 2
    first, second = generate(pair[0], [PROMPTS[1]] * 2, params=own)
    assert first.tokens == second.tokens
