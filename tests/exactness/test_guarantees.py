"""Guarantees 1 and 3 on tiny models: not one token changes.

Greedy output, and sampled output under the gumbel coupling, equal plain decoding's for
every drafter, block length, batch, bucket and schedule.
"""

import pytest

from jaxspark.decoding import Fixed
from jaxspark.exactness.audit import audit, decode_requests, plain_outputs
from jaxspark.generation import Request
from tests import zoo

LENGTHS = (1, 2, 17, 40, 5)
TEMPERATURES = (0.0, 1.0, 0.7, 0.0, 1.3)
# Buckets change nothing, see below: prompt lookup would have eight.
OPTIONS = {"capacity": 128, "buckets": (len(LENGTHS) * (zoo.BLOCK + 1),)}
# Drafters see embedding, head and taps of a target: on the second one two suffice.
ON_QWEN3 = [("qwen3", "dspark-rnn"), ("qwen3", "eagle3-pruned")]


def drafters(*names):
    """Of the first target, beside those of the second."""
    pairs = [("llama", name) for name in names] + ON_QWEN3
    return pytest.mark.parametrize(("model", "name"), pairs, indirect=["model"])


@pytest.fixture(scope="module")
def model(request):
    return zoo.target(getattr(request, "param", "llama"))


def requests(temperatures, **filters):
    return [
        Request(
            prompt,
            max_new_tokens=24,
            temperature=temperature,
            seed=i,
            name=str(i),
            **{name: values[i] for name, values in filters.items()},
        )
        for i, (prompt, temperature) in enumerate(
            zip(zoo.prompts(*LENGTHS), temperatures)
        )
    ]


@pytest.fixture(scope="module")
def greedy(model):
    asked = requests([0.0] * 5)
    # Greedy tokens know no coupling: one program decodes these and the sampled ones.
    return asked, plain_outputs(model, asked, coupling="gumbel", **OPTIONS)


@pytest.fixture(scope="module")
def sampled(model):
    asked = requests(TEMPERATURES)
    return asked, plain_outputs(model, asked, coupling="gumbel", **OPTIONS)


def assert_exact(model, asked, plain, seen):
    result = audit(model, asked, plain, seen)
    assert result.tokens >= 24 * len(asked)
    assert not result.violations, "\n".join(map(str, result.violations))
    assert len(result.near_ties) <= 1


@drafters("ngram", "dspark-pruned")
def test_greedy_is_greedy_in_a_batch(model, greedy, name):
    """Blocks of other lengths bring more drafters, see below."""
    asked, plain = greedy
    drafter = zoo.drafter(name, model)
    assert_exact(model, asked, plain, decode_requests(model, asked, drafter, **OPTIONS))


@drafters(*zoo.DRAFTERS)
def test_sampling_is_reproducible(model, sampled, name):
    """Two of these requests are greedy."""
    asked, plain = sampled
    drafter = zoo.drafter(name, model)
    seen = decode_requests(model, asked, drafter, coupling="gumbel", **OPTIONS)
    assert_exact(model, asked, plain, seen)


@pytest.mark.parametrize(
    ("name", "block_length"),
    [
        *(("ngram", 1), ("dspark-rnn", 1), ("eagle3", 1), ("hybrid", 1)),
        *(("dflash-masks", 5), ("eagle3-pruned", 5)),
    ],
)
def test_the_block_length_changes_nothing(model, greedy, name, block_length):
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


def test_filters_are_reproducible_too(model):
    asked = requests(
        [1.0] * 5,
        top_k=[0, 20, 0, 5, 0],
        top_p=[0.9, 1.0, 0.7, 0.8, 1.0],
        min_p=[0.0, 0.0, 0.05, 0.0, 0.1],
    )
    options = {"coupling": "gumbel", **OPTIONS}
    plain = plain_outputs(model, asked, **options)
    seen = decode_requests(model, asked, zoo.drafter("dspark-gated", model), **options)
    assert_exact(model, asked, plain, seen)


@pytest.mark.parametrize("buckets", [(64,), (1, 2, 3, 12, 99)], ids=str)
def test_buckets_change_nothing(model, sampled, buckets):
    asked, plain = sampled
    drafter = zoo.drafter("ngram", model)
    options = {**OPTIONS, "buckets": buckets}
    seen = decode_requests(model, asked, drafter, coupling="gumbel", **options)
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
    drafter = zoo.drafter("dspark-rnn", model)
    together = decode_requests(model, asked, drafter, **OPTIONS)
    alone = [decode_requests(model, [each], drafter, **OPTIONS)[0] for each in asked]
    assert [each.tokens for each in together] == [each.tokens for each in alone]


def test_the_audit_reports_a_changed_token(model, greedy):
    asked, plain = greedy
    other = decode_requests(model, asked[::-1], zoo.drafter("ngram", model), **OPTIONS)
    result = audit(model, asked, plain, other)
    assert result.violations
