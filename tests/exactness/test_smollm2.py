"""The embedded model with the drafter that comes with it.

`jaxspark audit --suite=all` has more prompts and schedules.
"""

import pytest

from jaxspark import load_drafter
from jaxspark.exactness.audit import audit, decode_requests, plain_outputs
from jaxspark.generation import Request

QUESTIONS = (
    "A box holds 12 eggs. How many eggs are in 7 boxes? Show each step.",
    "Write a Python function that counts the words of a text.",
    "What should I see in Lisbon?",
)
REPEATED = "Name three rivers and three mountains, then repeat the list."


@pytest.mark.long
def test_it_drafts_well_and_not_one_token_changes(smollm2):
    """Greedy and sampled requests together, copies and drafts of the model's."""
    asked = [(text, 0.0) for text in QUESTIONS] + [(REPEATED, 1.0)]
    requests = [
        Request(
            tuple(smollm2.tokenizer.chat([{"role": "user", "content": text}])),
            max_new_tokens=40,
            temperature=temperature,
            seed=3,
            name=text,
        )
        for text, temperature in asked
    ]
    options = {"coupling": "gumbel", "capacity": 128}
    plain = plain_outputs(smollm2, requests, **options)
    drafter = load_drafter("hybrid:dspark", smollm2)
    options["buckets"] = (len(requests) * (drafter.block_length + 1),)
    seen = decode_requests(smollm2, requests, drafter, **options)
    result = audit(smollm2, requests, plain, seen)
    assert not result.violations, "\n".join(map(str, result.violations))
    greedy = seen[: len(QUESTIONS)]
    tokens = sum(len(each.tokens) for each in greedy)
    # Prompt lookup gains little on such questions.
    assert tokens / sum(each.rounds for each in greedy) > 1.7
