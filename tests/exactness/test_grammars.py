"""Under a grammar speculation changes neither law nor token, and what ends obeys.

`jaxspark audit --suite=grammar` has every drafter, and 500 random grammars.
"""

import jax
import pytest

from jaxspark.decoding import DecodeOptions
from jaxspark.decoding.grammar_masks import MaskedAdjuster
from jaxspark.drafters import NgramDrafter
from jaxspark.exactness import grammars
from jaxspark.exactness.rejection_under_schedules import LEAKY, schedules_for_rejection
from jaxspark.exactness.told import parted
from jaxspark.generation import Request, generate, generate_stream
from jaxspark.grammars import Grammar, GrammarError, Matcher
from tests.checkpoints import tiny
from tests.serving.hosting import target as repeating

LAGGED = {"lagged": schedules_for_rejection()["lagged"]}


pytestmark = pytest.mark.usefixtures("compiled_soon")


@pytest.mark.parametrize(
    "drafter", [pytest.param("dspark-pruned", marks=pytest.mark.long), "ngram"]
)
def test_sampling_is_exact_by_enumeration(drafter):
    checks = grammars.enumeration_checks([drafter], schedules=LAGGED)
    assert len(checks) == len(grammars.CASES)
    assert not [check for check in checks if not check.holds]


def test_rounds_in_halves_sample_the_same_law():
    [check] = grammars.frequency_checks(4000, ["dspark-pruned"], ["rejection"])
    assert check.holds


def of_the_row_before(self, logits_TV, tokens, drafts_BG):
    earlier = (
        jax.numpy.roll(self.masks_BQU, 1, axis=1).at[:, 0].set(self.masks_BQU[:, 0])
    )
    wrong = MaskedAdjuster(
        adjuster=self.adjuster, masks_BQU=earlier, anchors_B=self.anchors_B
    )
    return ROWS(wrong, logits_TV, tokens, drafts_BG)


ROWS = MaskedAdjuster.rows


def test_enumeration_catches_masks_of_the_row_before(monkeypatch):
    monkeypatch.setattr(MaskedAdjuster, "rows", of_the_row_before)
    jax.clear_caches()
    try:
        checks = grammars.enumeration_checks([LEAKY], schedules={})
    finally:
        jax.clear_caches()
    assert not [check for check in checks if check.holds]


# Letters, of which one may come and nothing behind it.
DEAD_END = """
start: LETTER* | LETTER* "o" NOTHING
LETTER: /[a-np-z ]/
NOTHING: /a/ & /b/
"""


@pytest.fixture(scope="module")
def target():
    return repeating()


DRAFTERS = {
    "ngram": NgramDrafter(block_length=3, shortest=1),
    "dspark": tiny.drafter(block_size=4),
}


@pytest.fixture(scope="module")
def requests(target):
    return grammars.random_requests(target, 16, 3, max_new_tokens=40)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_not_one_token_changes_and_what_ends_obeys(target, requests, drafter):
    found = grammars.audit_grammars(target, DRAFTERS[drafter], requests, slots=5)
    assert not found.audit.violations and len(found.audit.near_ties) <= 1
    assert not found.disobeyed and not found.failed
    assert found.ended >= 8 and found.audit.rounds < found.audit.tokens


@pytest.fixture(scope="module")
def decoded(target):
    """Continues requests; few shapes, so that tests share programs."""

    def decoded(requests, drafter="ngram", **options):
        ended = generate_stream(
            *(target, requests, DRAFTERS.get(drafter)),
            slots=5,
            capacity=66,
            options=DecodeOptions(coupling="gumbel"),
            **options,
        )
        completions = dict(ended)
        return [completions[place] for place in range(len(requests))]

    return decoded


def test_plain_decoding_does_what_the_definition_says(target, requests, decoded):
    outputs = [each.tokens for each in decoded(requests, None)]
    assert not list(parted(target, requests, outputs))
    changed = [[5] + tokens[1:] for tokens in outputs]
    assert list(parted(target, requests, changed))


def test_others_in_the_batch_are_as_they_were(decoded):
    """Beside outputs under grammars, while these last and when they are over."""
    free = [
        Request("hello", max_new_tokens=30, temperature=float(i % 2), seed=i)
        for i in range(3)
    ]
    short = Request(
        "hello", max_new_tokens=9, seed=9, grammar=Grammar(kind="json_object")
    )
    alone, mixed = decoded(free), decoded([*free, short])
    assert [each.tokens for each in mixed[:3]] == [each.tokens for each in alone]
    assert mixed[3].text.startswith("{")


def test_what_is_excluded_otherwise_yields_to_the_grammar(target):
    [b] = target.tokenizer.encode("b")
    request = Request(
        "x",
        max_new_tokens=8,
        allowed_ids=[b],
        min_tokens=5,
        grammar=Grammar(kind="regex", value="ab?"),
    )
    [completion] = generate(target, [request], DRAFTERS["ngram"])
    assert completion.text == "ab" and completion.finish_reason == "stop"


def test_a_grammar_that_gives_up_ends_its_own_output_alone(decoded, monkeypatch):
    compute, calls = Matcher._compute, []

    def fails(self):
        calls.append(self)
        if len(calls) > 3:
            raise GrammarError("the grammar gave up: too complex")
        return compute(self)

    good = Request("hello", max_new_tokens=20, temperature=1.0, seed=1)
    bad = Request("hello", max_new_tokens=20, grammar=Grammar(kind="json_object"))
    [alone] = decoded([good])
    monkeypatch.setattr(Matcher, "_compute", fails)
    told = []
    first, failed = decoded(
        [good, bad], on_tokens=lambda index, tokens: told.append((index, tokens))
    )
    assert first.tokens == alone.tokens
    assert failed.finish_reason == "error" and "too complex" in failed.error
    assert [t for i, each in told if i == 1 for t in each] == failed.tokens


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_dead_ends_fail_outputs_that_enter_them_alone(decoded, drafter):
    """Whatever was drafted; outputs keep what came before, as in plain decoding."""
    grammar = Grammar(kind="grammar", value=DEAD_END)
    requests = [
        Request("hello", max_new_tokens=20, temperature=1.0, seed=seed, grammar=grammar)
        for seed in range(24)
    ]
    plain, found = decoded(requests, None), decoded(requests, drafter)
    assert [(each.tokens, each.error) for each in found] == [
        (each.tokens, each.error) for each in plain
    ]
    assert 4 < sum(each.error is not None for each in found) < 20
