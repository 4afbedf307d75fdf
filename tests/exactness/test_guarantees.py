"""Guarantees 1 and 3 on tiny models: not one token changes.

Greedy output, and sampled output under the gumbel coupling, equal plain decoding's
whatever the drafter, block length, batch, bucket and schedule. Here are drafters that
`jaxspark audit --suite=quick` does not have, and one of each family that it has.
"""

import pytest

from jaxspark.decoding import Fixed
from jaxspark.exactness.audit import audit, decode_requests, plain_outputs
from jaxspark.generation import Request
from tests import zoo

LENGTHS = (1, 2, 17, 40, 5)
TEMPERATURES = (0.0, 1.0, 0.7, 0.0, 1.3)
# Buckets change nothing, see below: prompt lookup would have two.
OPTIONS = {"capacity": 128, "buckets": (len(LENGTHS) * (zoo.BLOCK + 1),)}


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


@pytest.mark.parametrize(
    ("model", "name"),
    [("llama", "dspark-rnn"), ("qwen3", "eagle3-pruned")],
    indirect=["model"],
)
def test_greedy_is_greedy_in_a_batch(model, greedy, name):
    """Blocks of other lengths bring more drafters, see below."""
    asked, plain = greedy
    drafter = zoo.drafter(name, model)
    assert_exact(model, asked, plain, decode_requests(model, asked, drafter, **OPTIONS))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *(
            ("llama", name)
            for name in ("ngram", "dspark-rnn", "dflash-masks", "hybrid")
        ),
        ("qwen3", "eagle3-pruned"),
    ],
    indirect=["model"],
)
def test_sampling_is_reproducible(model, sampled, name):
    """Two of these requests are greedy."""
    asked, plain = sampled
    drafter = zoo.drafter(name, model)
    seen = decode_requests(model, asked, drafter, coupling="gumbel", **OPTIONS)
    assert_exact(model, asked, plain, seen)


@pytest.mark.parametrize(
    ("name", "block_length"), [("hybrid", 1), ("eagle3", 1), ("dflash-masks", 5)]
)
def test_the_block_length_changes_nothing(model, greedy, name, block_length):
    asked, plain = greedy
    drafter = zoo.drafter(name, model)
    seen = decode_requests(model, asked, drafter, block_length=block_length, **OPTIONS)
    assert_exact(model, asked, plain, seen)


def test_greedy_is_greedy_alone(model, greedy):
    asked, plain = greedy
    drafter = zoo.drafter("dspark-rnn", model)
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
    seen = decode_requests(model, asked, zoo.drafter("dspark-rnn", model), **options)
    assert_exact(model, asked, plain, seen)


def test_buckets_change_nothing(model, sampled):
    """Too small for the anchors, nor multiples of anything, larger than all drafts."""
    asked, plain = sampled
    drafter = zoo.drafter("ngram", model)
    options = {**OPTIONS, "buckets": (3, 12, 99)}
    seen = decode_requests(model, asked, drafter, coupling="gumbel", **options)
    assert_exact(model, asked, plain, seen)


def test_the_verification_length_changes_nothing(model, sampled):
    asked, plain = sampled
    drafter = zoo.drafter("dspark-vanilla", model)
    seen = decode_requests(
        model, asked, drafter, schedule=Fixed(3), coupling="gumbel", **OPTIONS
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
    drafter = zoo.drafter("dspark-rnn", model)
    other = decode_requests(model, asked[::-1], drafter, **OPTIONS)
    result = audit(model, asked, plain, other)
    assert result.violations
