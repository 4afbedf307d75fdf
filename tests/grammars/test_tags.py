"""Free text stays free, and behind a trigger what is obliged must follow."""

import pytest

from jaxspark.grammars import Grammar, GrammarError, StructuralTags, Tag, matcher_of
from jaxspark.grammars.matcher import allows
from tests.checkpoints import tiny

END = 257
NUMBER = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FUNCTIONS = StructuralTags(
    structures=[
        Tag(begin="<function=f>", schema=NUMBER, end="</function>"),
        Tag(begin="<function=g>", schema={"const": 5}, end="</function>"),
        Tag(begin="[json]", schema={"enum": [True, None]}, end=""),
    ],
    triggers=["<function=", "[json]"],
)
F, G = '<function=f>{"a": 1}</function>', "<function=g>5</function>"


def obeys(text, tags=FUNCTIONS, tokenizer=None):
    """How much of a text obeys: all of it, its beginning, or not even that."""
    tokenizer = tokenizer or tiny.tokenizer()
    grammar = Grammar(kind="structural_tag", value=tags)
    matcher = matcher_of(grammar, tokenizer, vocab=300, stop_ids=(END,))
    for token in tokenizer.encode(text, add_special_tokens=False):
        if not allows(matcher.mask(), token):
            return "not"
        matcher.advance([token])
    return "all" if allows(matcher.mask(), END) else "beginning"


@pytest.mark.parametrize(
    "text",
    [
        *("", "free text", "a < b <func", "line\nline", "</function>"),
        *(F, f"say {F}", f"{F}{G} and {G}{F}\nend", "x [json]null [json]true"),
        '<function=f>{"a": 1, "b": "<function=h>"}</function>',
    ],
)
def test_texts_that_obey(text):
    assert obeys(text) == "all"


@pytest.mark.parametrize(
    "text",
    [
        *("<function=h", "say <function=f> {", F.replace("1", '"1"'), F[:-1] + "!"),
        *(f"{F}<function= ", "<function=g>6", "[json]false", f"{G}[json] x"),
    ],
)
def test_texts_that_do_not(text):
    assert obeys(text) == "not"


@pytest.mark.parametrize("text", ["<function=", F[:-1], G[:-2], "free [json]nul"])
def test_an_output_cannot_end_inside_a_structure(text):
    assert obeys(text) == "beginning"


def test_triggers_and_ends_may_be_control_tokens():
    tokenizer = tiny.tokenizer()
    tokenizer.core.add_special_tokens(["<tool_call>", "</tool_call>"])
    tags = StructuralTags(
        structures=[
            Tag(begin="<tool_call>one", schema={"const": 1}, end="</tool_call>"),
            Tag(begin="<tool_call>two", schema={"const": 2}, end="</tool_call>"),
        ],
        triggers=["<tool_call>"],
    )
    call = "<tool_call>two2</tool_call>"
    assert len(tokenizer.encode(call, add_special_tokens=False)) == 6
    assert obeys(f"say {call}{call} end", tags, tokenizer) == "all"
    assert obeys("<tool_call>two1", tags, tokenizer) == "not"
    assert obeys(call.removesuffix("</tool_call>") + "<", tags, tokenizer) == "not"


@pytest.mark.parametrize(
    "tags, message",
    [
        (StructuralTags(structures=[], triggers=["<"]), "no structures"),
        (
            StructuralTags(
                structures=[Tag(begin="[f]", schema={}, end="")], triggers=["<", "("]
            ),
            r"'\[f\]' begins with none of the triggers \['<', '\('\]",
        ),
        (
            StructuralTags(
                structures=[Tag(begin="[f]", schema={}, end="")], triggers=[""]
            ),
            "a trigger is empty",
        ),
        ({"structures": []}, "must be `StructuralTags`, got"),
    ],
)
def test_what_is_no_tag_is_refused(tags, message):
    with pytest.raises(GrammarError, match=message):
        obeys("", tags)
