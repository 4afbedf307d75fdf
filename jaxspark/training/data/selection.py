"""Selecting conversations from files: whole ones, or their first questions."""

import itertools
import random
import sys
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from jaxspark.jsonlines import MalformedRow, first_reasons
from jaxspark.text import Tokenizer
from jaxspark.training.data.conversations import Conversation, read_conversations


def select_conversations(
    paths: Iterable[str | Path],
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    most: int | None = None,
    seed: int = 0,
) -> list[Conversation | MalformedRow]:
    """Conversations of several files in turn, each file shuffled, none twice.

    Args:
      paths: JSON lines or dataset folders.
      include: patterns of the `source` to take.
      exclude: patterns of the `source` to leave out.
      most: how many at most; None: all.
      seed: of the order.
    """

    def wanted(source: str) -> bool:
        taken, left = (
            any(fnmatch(source, pattern) for pattern in patterns)
            for patterns in (include, exclude)
        )
        return taken and not left

    columns = []
    for path in paths:
        rows = [
            row
            for row in read_conversations([path])
            if isinstance(row, MalformedRow) or wanted(row.source)
        ]
        random.Random(seed).shuffle(rows)
        columns.append(rows)
    known: dict[str, Conversation | MalformedRow] = {}
    for row in _in_turn(columns):
        known.setdefault(row.where if isinstance(row, MalformedRow) else row.key, row)
    return list(known.values())[:most]


def first_questions(
    tokenizer: Tokenizer,
    paths: Iterable[str | Path],
    *,
    most: int,
    max_tokens: int,
) -> list[list[int]]:
    """First questions of several files in turn, as token ids.

    Says where there are fewer than `most`, and what was dropped.

    Args:
      tokenizer: with a chat template.
      paths: JSON lines or dataset folders.
      most: how many at most.
      max_tokens: longer ones are passed over.

    Raises:
      ValueError: there is none.
    """
    columns: list[list[list[int]]] = []
    dropped: list[MalformedRow] = []
    for path in paths:
        column = []
        for row in read_conversations([path]):
            asked = _first_question(tokenizer, row)
            if isinstance(asked, MalformedRow):
                dropped.append(asked)
            elif len(asked) <= max_tokens:
                column.append(asked)
        columns.append(column)
    fitting = list(_in_turn(columns))
    said = (
        f"the data have {len(fitting)} questions of at most {max_tokens} tokens, "
        f"{most} were asked for"
    )
    if dropped:
        said += f"; {len(dropped)} dropped: {first_reasons(dropped)}"
    if not fitting:
        raise ValueError(said)
    if dropped or len(fitting) < most:
        print(said, file=sys.stderr)
    return fitting[:most]


def _first_question(
    tokenizer: Tokenizer, row: Conversation | MalformedRow
) -> list[int] | MalformedRow:
    if isinstance(row, MalformedRow):
        return row
    asked = list(itertools.takewhile(lambda m: m["role"] != "assistant", row.messages))
    if not asked:
        return MalformedRow(row.where, "no message before the assistant's")
    try:
        return tokenizer.chat(asked, tools=row.tools)
    except Exception as error:  # Templates raise whatever they like.
        return MalformedRow(row.where, str(error))


def _in_turn[T](columns: Iterable[Iterable[T]]) -> Iterable[T]:
    """One of each column, then the next of each, for as long as there are any."""
    for turn in itertools.zip_longest(*columns):
        yield from (each for each in turn if each is not None)
