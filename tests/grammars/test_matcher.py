"""Masks along drafts are those behind committed tokens, and stops have a rule."""

import json

import numpy as np
import pytest

from jaxspark.checkpoints import Tokenizer
from jaxspark.exactness.random_grammars import obeys, random_grammars
from jaxspark.grammars import Grammar, GrammarError, matcher_of
from jaxspark.grammars.matcher import ALL, allows, listed
from jaxspark.text.thinking import ThinkFormat
from tests.checkpoints import tiny

VOCAB, END = 300, 257
TINY = tiny.tokenizer()


def started(grammar, tokenizer=TINY, vocab=VOCAB, stop_ids=(END,)):
    return matcher_of(grammar, tokenizer, vocab=vocab, stop_ids=stop_ids)


def ids(text):
    return TINY.encode(text, add_special_tokens=False)


def walk(random, matcher, vocab, length):
    """Tokens of an output, drawn from its masks."""
    matcher, tokens = matcher.fork(), []
    for _ in range(length):
        tokens.append(int(random.choice(listed(matcher.mask()))))
        matcher.advance(tokens[-1:])
        if tokens[-1] in matcher._stop_ids:
            break
    return tokens


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_masks_along_drafts_are_those_behind_committed_tokens(name, request):
    random, tokenizer, vocab, stops = np.random.default_rng(0), TINY, VOCAB, (END,)
    if name == "smollm2":
        target = request.getfixturevalue("smollm2")
        tokenizer, stops = target.tokenizer, target.stop_ids
        vocab = target.model.config.vocab_size
    for grammar in random_grammars(random, 12):
        first = started(grammar, tokenizer, vocab, stops)
        tokens = walk(random, first, vocab, 40)
        at, matcher, plain = 0, first.fork(), first.fork()
        while at < len(tokens):
            # Some drafts are right, then there may be a wrong one.
            drafts = tokens[at : at + int(random.integers(1, 6))]
            right = len(drafts)
            if random.random() < 0.5:
                drafts = [*drafts, int(random.integers(vocab)), 5]
            masks_QU = matcher.masks_along(drafts)
            for row in range(right + 1):
                np.testing.assert_array_equal(masks_QU[row], plain.mask())
                if at + row == len(tokens) or tokens[at + row] in stops:
                    break
                if row < right:
                    plain.advance(tokens[at + row : at + row + 1])
            np.testing.assert_array_equal(matcher.masks_along([]), masks_QU[:1])
            matcher.advance(drafts[:right])
            at += right


def test_stops_are_allowed_where_the_output_is_complete():
    matcher = started(Grammar(kind="regex", value="ab*"))
    assert (listed(matcher.mask())) == ids("a")
    matcher.advance(ids("a"))
    assert set(listed(matcher.mask())) == {*ids("b"), END}
    assert not matcher.finished
    masks_QU = matcher.masks_along([*ids("b"), END, *ids("bb")])
    assert set(listed(masks_QU[1])) == {*ids("b"), END}
    assert (masks_QU[2:] == 2**32 - 1).all()  # Nothing is put out behind a stop.
    done = started(Grammar(kind="choice", value=["yes", "yet"]))
    done.advance(ids("yes"))
    assert done.finished and (listed(done.mask())) == [END]


def test_stops_of_a_request_are_its_own():
    """Others that the tokenizer has do not end it; those that are text may be text."""
    [b] = ids("b")
    matcher = started(Grammar(kind="regex", value="ab+c"), stop_ids=(256, b))
    matcher.advance(ids("a"))
    assert (listed(matcher.mask())) == [b]
    matcher.advance(ids("b"))
    assert matcher.taken == 2
    whole = started(Grammar(kind="regex", value="a"), stop_ids=(256, b))
    whole.advance(ids("a"))
    assert set(listed(whole.mask())) == {256, b}


def test_outputs_of_one_grammar_do_not_meet():
    grammar = Grammar(kind="regex", value="a|bc")
    one, other = started(grammar), started(grammar)
    one.advance(ids("b"))
    assert (listed(one.mask())) == ids("c")
    assert set(listed(other.mask())) == {*ids("a"), *ids("b")}
    forked = one.fork()
    one.advance(ids("c"))
    assert (listed(forked.mask())) == ids("c") and forked.taken == 1


@pytest.mark.parametrize(
    "kind, value, right, wrong",
    [
        ("json_object", None, ['{"a": [1, null]}', "{}"], ["[]", "{,}"]),
        ("json_schema", '{"type": "integer"}', ["-12"], ["1.5", "01"]),
        ("json_schema", True, ["[]", '"a"'], ["}"]),
        ("regex", "^a/b[0-9]{2}$", ["a/b12"], ["a/b1", "a/b123"]),
        ("choice", ["a", 'b"\\\n\0', "é😀"], ["a", 'b"\\\n\0', "é😀"], ["b", "é"]),
        ("grammar", 'start: "x" y\ny: /z*/', ["x", "xzz"], ["z"]),
    ],
)
def test_kinds(kind, value, right, wrong):
    def obeys(text):
        matcher = started(Grammar(kind=kind, value=value))
        try:
            matcher.advance(ids(text))
        except GrammarError:
            return False
        return allows(matcher.mask(), END)

    assert [obeys(each) for each in right] == [True] * len(right)
    assert [obeys(each) for each in wrong] == [False] * len(wrong)


def test_white_space_of_json_has_an_end():
    matcher = started(Grammar(kind="json_object"))
    matcher.advance(ids("{" + " " * 32))
    assert not {*ids(" \n\t")} & {*listed(matcher.mask())}


@pytest.mark.parametrize("opened", [True, False])
def test_what_obeys_comes_behind_a_think_block(opened):
    grammar = Grammar(
        kind="choice", value=["yes"], thinking=ThinkFormat(), opened=opened
    )
    thought = "" if opened else "<think>"
    matcher = started(grammar)
    matcher.advance(ids(f'{thought}yes "no" </thin</think>\n\nye'))
    assert (listed(matcher.mask())) == ids("s")
    matcher = started(grammar)
    if opened:
        matcher.advance(ids("yes"))
        assert not allows(matcher.mask(), END)
    else:
        matcher.advance(ids("yes"))
        assert matcher.finished


@pytest.mark.parametrize(
    "grammar, match",
    [
        (Grammar(kind="json_schema", value={"type": "objectt"}), "objectt"),
        (
            Grammar(kind="json_schema", value={"not": {}}),
            r'Unimplemented keys: \["not"\]',
        ),
        (Grammar(kind="json_schema", value="{"), "no JSON"),
        (Grammar(kind="json_schema", value=3), "is an object, got 3"),
        (Grammar(kind="regex", value="a(?=b)"), "look-around"),
        (Grammar(kind="regex", value=""), "not empty"),
        (Grammar(kind="choice", value="yes"), "a list of texts"),
        (Grammar(kind="choice", value=["a", ""]), "not empty"),
        (Grammar(kind="grammar", value="start: foo"), 'unknown name: "foo"'),
        (Grammar(kind="calls", value=[]), "`Calls`"),
        (Grammar(kind="ebnf", value="x"), "unknown kind of grammar 'ebnf'"),
    ],
)
def test_what_is_no_grammar_is_refused_in_llguidances_words(grammar, match):
    with pytest.raises(GrammarError, match=match):
        started(grammar)


def test_what_no_grammar_can_be_had_for_is_refused():
    grammar = Grammar(kind="json_object")
    with pytest.raises(GrammarError, match="no tokenizer"):
        started(grammar, None)
    with pytest.raises(GrammarError, match="needs a stop token"):
        started(grammar, stop_ids=())
    with pytest.raises(GrammarError, match="cannot take this BPE tokenizer: .*vocab"):
        started(grammar, vocab=5)


def test_an_output_that_no_token_continues_fails():
    core = json.loads(TINY.core.to_str())
    core["model"]["vocab"] = {"a": 0, "b": 1}
    core["added_tokens"] = [core["added_tokens"][1] | {"id": 2}]
    few = Tokenizer(
        core=type(TINY.core).from_str(json.dumps(core)),
        stop_ids=(2,),
        special_tokens={"eos_token": "</s>"},
    )
    matcher = started(Grammar(kind="regex", value="ab*c"), few, 3, (2,))
    matcher.advance([0])
    assert not allows(matcher.mask(), 2)
    none = started(Grammar(kind="regex", value="c"), few, 3, (2,))
    with pytest.raises(GrammarError, match="no token of this model|gave up"):
        none.mask()


@pytest.mark.parametrize(
    "lark",
    [
        'start: "ok" | "x" "y" NOTHING\nNOTHING: /a/ & /b/',
        'start: "ok" | "x" s\ns: s s | "y" | /[a-z]/ | ""',  # Too complex for a mask.
    ],
)
def test_a_draft_that_leads_nowhere_fails_an_output_only_if_it_is_taken(lark, smollm2):
    tokenizer, vocab = smollm2.tokenizer, smollm2.model.config.vocab_size
    stops = smollm2.stop_ids
    first = started(Grammar(kind="grammar", value=lark), tokenizer, vocab, stops)
    drafts = [tokenizer.encode(each)[0] for each in "xya"]
    other = first.fork()
    masks_QU = other.masks_along(drafts)
    other.advance(tokenizer.encode("ok"))
    assert set(listed(other.mask())) == set(stops)

    dead_end = next(count for count in (1, 2) if (masks_QU[count] == ALL).all())
    for tokens in (drafts, drafts[:dead_end]):
        output = first.fork()
        output.masks_along(drafts)
        with pytest.raises(GrammarError, match="gave up"):
            output.advance(tokens)
            output.mask()
        assert output.taken == dead_end


def test_every_random_output_that_ends_obeys(smollm2):
    """40 grammars of both kinds, under the tokens of a real model."""
    random, config = np.random.default_rng(1), smollm2.model.config
    ended = 0
    for grammar in random_grammars(random, 40):
        first = started(grammar, smollm2.tokenizer, config.vocab_size, smollm2.stop_ids)
        tokens = walk(random, first, config.vocab_size, 60)
        text = smollm2.tokenizer.decode(t for t in tokens if t not in smollm2.stop_ids)
        if tokens[-1] in smollm2.stop_ids:
            ended += 1
            assert obeys(grammar, text), (grammar, text)
    assert ended > 15
