"""The guarantees on the embedded model, a few prompts (launch/audit.py runs many)."""

import pytest

from jaxspark import load_drafter
from jaxspark.decoding import Request
from jaxspark.exactness.audit import audit, decode_requests, plain_outputs

QUESTIONS = (
    "What is 17 times 3? Show each step.",
    "Write a Python function that reverses a list.",
    "Name three rivers and three mountains, then repeat the list.",
)


@pytest.mark.parametrize("draft", ["ngram", "dspark", "hybrid:dspark"])
@pytest.mark.parametrize(
    ("coupling", "temperature"), [("rejection", 0.0), ("gumbel", 1.0)]
)
def test_not_one_token_changes(smollm2, coupling, temperature, draft):
    requests = [
        Request(
            prompt=tuple(smollm2.tokenizer.chat([{"role": "user", "content": text}])),
            max_new_tokens=32,
            temperature=temperature,
            seed=i,
            name=text,
        )
        for i, text in enumerate(QUESTIONS)
    ]
    plain = plain_outputs(smollm2, requests, coupling=coupling, capacity=128)
    drafter = load_drafter(draft, smollm2)
    seen = decode_requests(
        smollm2, requests, drafter, block_length=3, coupling=coupling, capacity=128
    )
    result = audit(smollm2, requests, plain, seen)
    assert result.tokens > 60
    assert not result.violations, "\n".join(map(str, result.violations))
