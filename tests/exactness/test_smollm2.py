"""Guarantee 3 on the embedded model, a few prompts (launch/audit.py runs many).

Guarantee 1 there is a test of the drafter that comes with it, `test_shipped`.
"""

from jaxspark import load_drafter
from jaxspark.exactness.audit import audit, decode_requests, plain_outputs
from jaxspark.generation import Request

QUESTIONS = (
    "What is 17 times 3? Show each step.",
    "Name three rivers and three mountains, then repeat the list.",
)


def test_not_one_token_changes(smollm2):
    """Greedy and sampled requests together, copies and drafts of the model's."""
    requests = [
        Request(
            tuple(smollm2.tokenizer.chat([{"role": "user", "content": text}])),
            max_new_tokens=20,
            temperature=temperature,
            seed=i,
            name=text,
        )
        for temperature in (0.0, 1.0)
        for i, text in enumerate(QUESTIONS)
    ]
    options = {"coupling": "gumbel", "capacity": 128}
    plain = plain_outputs(smollm2, requests, **options)
    drafter = load_drafter("hybrid:dspark", smollm2)
    options |= {"block_length": 3, "buckets": (16,)}
    seen = decode_requests(smollm2, requests, drafter, **options)
    result = audit(smollm2, requests, plain, seen)
    assert result.tokens > 60
    assert not result.violations, "\n".join(map(str, result.violations))
