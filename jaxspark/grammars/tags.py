"""Structural tags as Lark: free text, in which some beginnings oblige.

Text is free until it holds a trigger. Then one of the structures must follow that begin
with this trigger: the rest of its beginning, JSON that obeys its schema, its end; and
text is free again. vLLM and SGLang have the same form.

A trigger is a lazy lexeme, free text with the trigger as its end: as soon as it is
there it is taken, so that no text can run past it.
"""

import json
from typing import TYPE_CHECKING

from jaxspark.grammars.calls import Prepare
from jaxspark.grammars.grammar import StructuralTags
from jaxspark.grammars.matcher import GrammarError
from jaxspark.grammars.vocabulary import control, quoted

if TYPE_CHECKING:
    from llguidance import LLTokenizer


def tags_lark(tags: StructuralTags, tokens: "LLTokenizer", prepare: Prepare) -> str:
    """A grammar of text with structures.

    Args:
      tags: what they are.
      tokens: the target's; triggers and ends that are control tokens are these tokens.
      prepare: applied to every schema.

    Raises:
      GrammarError: no structures, an empty trigger, or a beginning without any.
    """
    if not tags.structures:
        raise GrammarError("structural_tag: there are no structures")
    lines = ["", "TEXT: /(?s:.*)/"]
    behind: dict[str, list[str]] = {}
    for place, tag in enumerate(tags.structures):
        trigger = _trigger(tags, tag.begin)
        rest = tag.begin.removeprefix(trigger)
        parts = [quoted(rest)] if rest else []
        parts.append(f"%json {json.dumps(prepare(tag.schema))}")
        parts += [control(tokens, tag.end) or quoted(tag.end)] if tag.end else []
        lines.append(f"tag{place}: {' '.join(parts)}")
        behind.setdefault(trigger, []).append(f"tag{place}")
    either = []
    for place, (trigger, rules) in enumerate(behind.items()):
        token = control(tokens, trigger)
        if token is None:
            lines.append(f"trigger{place}[lazy]: TEXT {quoted(trigger)}")
        else:
            lines.append(f"trigger{place}: TEXT {token}")
        either.append(f"trigger{place} ({' | '.join(rules)})")
    lines[0] = f"start: ({' | '.join(either)})* rest\nrest: TEXT"
    return "\n".join(lines)


def _trigger(tags: StructuralTags, begin: str) -> str:
    """That of a structure, the first with which it begins."""
    if not all(tags.triggers):
        raise GrammarError("structural_tag: a trigger is empty")
    for trigger in tags.triggers:
        if begin.startswith(trigger):
            return trigger
    raise GrammarError(
        f"structural_tag: {begin!r} begins with none of the triggers "
        f"{list(tags.triggers)}"
    )
