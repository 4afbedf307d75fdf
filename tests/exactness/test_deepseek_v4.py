"""The guarantees on DeepSeek-V4, with its own drafters, prompt lookup and a hybrid.

Small ones of `jaxspark audit --suite=deepseek_v4`, which enumerates all drafters, with
random weights.
"""

import pytest

from jaxspark.decoding import DecodeOptions
from jaxspark.exactness import rejection
from jaxspark.exactness.audit import audit, plain_outputs
from jaxspark.exactness.tiny_models import tiny_models
from jaxspark.generation import Request, generate_stream
from tests import zoo

NAMES = ("deepseek_v4_dspark", "mtp")
# One token bucket: prompt lookup would have a ladder of them.
OPTIONS = {"capacity": 128, "buckets": (25,)}


@pytest.fixture(scope="module")
def models():
    """A target, and drafters of blocks of 4."""
    return tiny_models("deepseek_v4", zoo.VOCAB, block_length=4)


def requests(temperatures):
    """Prompts below and above every boundary, long enough answers to cross some."""
    prompts = zoo.prompts(1, 2, 17, 40, 5)
    return [
        Request(
            prompt,
            max_new_tokens=24,
            temperature=temperature,
            seed=i,
            name=str(i),
        )
        for i, (prompt, temperature) in enumerate(zip(prompts, temperatures))
    ]


@pytest.fixture(scope="module")
def asked(request, models):
    """Requests, how they are coupled, and what plain decoding says."""
    greedy = request.param == "greedy"
    each = requests([0.0] * 5 if greedy else [0.0, 1.0, 0.7, 0.0, 1.3])
    coupling = "rejection" if greedy else "gumbel"
    # Greedy tokens know no coupling: one program decodes both.
    plain = plain_outputs(models[0], each, coupling="gumbel", **OPTIONS)
    assert len({token for tokens in plain for token in tokens}) > 20
    return each, coupling, plain


@pytest.mark.parametrize(
    ("asked", "name"),
    [("gumbel", "hybrid"), pytest.param("greedy", "mtp", marks=pytest.mark.long)],
    indirect=["asked"],
)
def test_slots_are_refilled_and_not_one_token_changes(models, asked, name):
    """Five requests through two slots: newcomers bring their tables of rows."""
    each, coupling, plain = asked
    target, drafters = models
    options = DecodeOptions(coupling=coupling, buckets=(10,))
    size = {"slots": 2, "together": 1, "capacity": 128}
    done = dict(generate_stream(target, each, drafters[name], options=options, **size))
    result = audit(target, each, plain, [done[i] for i in range(len(each))])
    assert result.tokens >= 24 * len(each)
    assert not result.violations, "\n".join(map(str, result.violations))
    assert len(result.near_ties) <= 1


@pytest.mark.long
def test_a_round_has_the_targets_distribution():
    checks = rejection.enumeration_checks(NAMES, family="deepseek_v4")
    assert len(checks) == len(NAMES)
    assert not [check for check in checks if not check.holds]
