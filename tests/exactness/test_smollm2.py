"""The guarantees on the embedded model, a few prompts (launch/audit.py runs many)."""

import pytest

from jaxspark import load_drafter
from jaxspark.exactness.audit import audit, decode_requests, plain_outputs
from jaxspark.generation import Request

QUESTIONS = (
    "What is 17 times 3? Show each step.",
    "Write a Python function that reverses a list.",
    "Name three rivers and three mountains, then repeat the list.",
)


@pytest.fixture(scope="module")
def asked(smollm2):
    """Greedy and sampled requests, and what plain decoding says."""
    requests = [
        Request(
            tuple(smollm2.tokenizer.chat([{"role": "user", "content": text}])),
            max_new_tokens=32,
            temperature=temperature,
            seed=i,
            name=text,
        )
        for temperature in (0.0, 1.0)
        for i, text in enumerate(QUESTIONS)
    ]
    return requests, plain_outputs(smollm2, requests, coupling="gumbel", capacity=128)


@pytest.mark.parametrize(
    ("coupling", "draft"),
    [
        ("gumbel", "ngram"),
        ("gumbel", "dspark"),
        ("gumbel", "hybrid:dspark"),
        ("rejection", "hybrid:dspark"),
    ],
)
def test_not_one_token_changes(smollm2, asked, coupling, draft):
    """All requests under the gumbel coupling, greedy ones under any."""
    count = len(QUESTIONS) * (1 if coupling == "rejection" else 2)
    requests, plain = (each[:count] for each in asked)
    drafter = load_drafter(draft, smollm2)
    options = {"block_length": 3, "buckets": (4 * count,), "capacity": 128}
    seen = decode_requests(smollm2, requests, drafter, coupling=coupling, **options)
    result = audit(smollm2, requests, plain, seen)
    assert result.tokens > 60
    assert not result.violations, "\n".join(map(str, result.violations))
