"""Guarantees 1 and 3 on tiny models: not one token changes.

Greedy output, and sampled output under the gumbel coupling, equal plain decoding's for
every drafter, block length, batch, bucket and schedule.
"""

import pytest

from jaxspark.decoding import Fixed, Request, generate
from jaxspark.evaluation.audit import audit, decode_requests, plain_outputs
from tests import zoo

LENGTHS = (1, 2, 17, 40, 5)
TEMPERATURES = (0.0, 1.0, 0.7, 0.0, 1.3)
OPTIONS = {"capacity": 128}


@pytest.fixture(scope="module", params=zoo.TARGETS)
def model(request):
    return zoo.target(request.param)


def requests(temperatures):
    return [
        Request(
            prompt=tuple(prompt),
            max_new_tokens=24,
            temperature=temperature,
            seed=i,
            name=str(i),
        )
        for i, (prompt, temperature) in enumerate(
            zip(zoo.prompts(*LENGTHS), temperatures)
        )
    ]


@pytest.fixture(scope="module")
def greedy(model):
    asked = requests([0.0] * 5)
    return asked, plain_outputs(model, asked, **OPTIONS)


@pytest.fixture(scope="module")
def sampled(model):
    asked = requests(TEMPERATURES)
    return asked, plain_outputs(model, asked, coupling="gumbel", **OPTIONS)


def assert_exact(model, asked, plain, seen):
    result = audit(model, asked, plain, seen)
    assert result.tokens >= 24 * len(asked)
    assert not result.violations, "\n".join(map(str, result.violations))
    assert len(result.near_ties) <= 1


@pytest.mark.parametrize("name", zoo.DRAFTERS)
@pytest.mark.parametrize("block_length", [1, 8])
def test_greedy_is_greedy_in_a_batch(model, greedy, name, block_length):
    asked, plain = greedy
    drafter = zoo.drafter(name, model)
    seen = decode_requests(model, asked, drafter, block_length=block_length, **OPTIONS)
    assert_exact(model, asked, plain, seen)


@pytest.mark.parametrize("name", ["ngram", "dspark-rnn"])
def test_greedy_is_greedy_alone(model, greedy, name):
    asked, plain = greedy
    drafter = zoo.drafter(name, model)
    seen = [decode_requests(model, [each], drafter, **OPTIONS)[0] for each in asked]
    assert_exact(model, asked, plain, seen)


@pytest.mark.parametrize("name", zoo.DRAFTERS)
@pytest.mark.parametrize("block_length", [5])
def test_sampling_is_reproducible(model, sampled, name, block_length):
    asked, plain = sampled
    drafter = zoo.drafter(name, model)
    seen = decode_requests(
        model, asked, drafter, block_length=block_length, coupling="gumbel", **OPTIONS
    )
    assert_exact(model, asked, plain, seen)


def test_filters_and_log_probs_are_reproducible_too(model):
    settings = dict(
        temperature=1.0, top_k=[0, 20, 0], top_p=[0.9, 1, 0.7], min_p=[0, 0, 0.05]
    )
    prompts = zoo.prompts(3, 9, 30)
    drafter = zoo.drafter("dspark-gated", model)
    plain = generate(model, prompts, coupling="gumbel", max_new_tokens=24, **settings)
    seen = generate(
        model, prompts, drafter, coupling="gumbel", max_new_tokens=24, **settings
    )
    assert [each.tokens for each in seen] == [each.tokens for each in plain]


@pytest.mark.parametrize("buckets", [(64,), (1, 2, 3, 12, 99)], ids=str)
def test_buckets_change_nothing(model, sampled, buckets):
    asked, plain = sampled
    drafter = zoo.drafter("ngram", model)
    seen = decode_requests(
        model, asked, drafter, buckets=buckets, coupling="gumbel", **OPTIONS
    )
    assert_exact(model, asked, plain, seen)


@pytest.mark.parametrize("length", [0, 3])
def test_the_verification_length_changes_nothing(model, sampled, length):
    asked, plain = sampled
    drafter = zoo.drafter("dspark-vanilla", model)
    seen = decode_requests(
        model, asked, drafter, schedule=Fixed(length), coupling="gumbel", **OPTIONS
    )
    assert_exact(model, asked, plain, seen)


def test_slots_may_be_permuted(model, sampled):
    asked, plain = sampled
    order = [3, 0, 4, 2, 1]
    drafter = zoo.drafter("dspark-rnn", model)
    seen = decode_requests(
        model, [asked[i] for i in order], drafter, coupling="gumbel", **OPTIONS
    )
    assert_exact(model, [asked[i] for i in order], [plain[i] for i in order], seen)


def test_rejection_sampling_ignores_its_batch(model):
    """Random numbers belong to the request: alone or beside others, the same tokens."""
    asked = requests([1.0] * 5)
    drafter = zoo.drafter("dspark-gated", model)
    together = decode_requests(model, asked, drafter, **OPTIONS)
    alone = [decode_requests(model, [each], drafter, **OPTIONS)[0] for each in asked]
    assert [each.tokens for each in together] == [each.tokens for each in alone]


def test_the_audit_reports_a_changed_token(model, greedy):
    asked, plain = greedy
    other = decode_requests(model, asked[::-1], **OPTIONS)
    result = audit(model, asked, plain, other)
    assert result.violations
