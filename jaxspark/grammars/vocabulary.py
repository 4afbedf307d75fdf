"""A tokenizer as llguidance knows it: the bytes of every token, in a trie."""

import functools
import json
from typing import TYPE_CHECKING, Any

from jaxspark.text import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer


def library() -> Any:
    """The module llguidance, which not everyone needs.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import llguidance
    except ImportError as error:
        raise ValueError(
            "grammars need the package llguidance, which is not installed; run "
            "pip install 'jaxspark[serve]'"
        ) from error
    return llguidance


@functools.lru_cache(maxsize=4)
def vocabulary(tokenizer: Tokenizer, size: int) -> "LLTokenizer":
    """Tokens of a target; made once, which can take a second.

    Args:
      tokenizer: the target's.
      size: ids there are; those without a token are never allowed.

    Raises:
      ValueError: llguidance cannot take this tokenizer, or is not installed.
    """
    llguidance, eos = library(), tokenizer.hf.eos_token_id
    if eos is None and tokenizer.stop_ids:
        eos = tokenizer.stop_ids[0]
    try:
        return llguidance.LLTokenizer(
            tokenizer.core.to_str(), n_vocab=size, eos_token=eos
        )
    except Exception as error:  # It has no types of its own.
        kind = type(tokenizer.core.model).__name__
        raise ValueError(
            f"grammars: llguidance cannot take this {kind} tokenizer: {error}"
        ) from error


def quoted(text: str) -> str:
    """A text as a string of Lark, whose strings are JSON's."""
    return json.dumps(text)


def control(tokens: "LLTokenizer", text: str) -> str | None:
    """A control token of this name, in Lark; None where there is none."""
    ids = tokens.tokenize_str(text, parse_special=True)
    if len(ids) != 1 or not tokens.is_special_token(ids[0]):
        return None
    return f"<[{ids[0]}]>"


def literal(tokens: "LLTokenizer", text: str, *, mark: str) -> str:
    """A text in Lark, in which the mark is a control token if there is one."""
    token = control(tokens, mark)
    if token is None:
        return quoted(text)
    parts = [f" {quoted(part)} " if part else "" for part in text.split(mark)]
    return token.join(parts).strip()
