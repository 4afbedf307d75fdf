"""Conversations from JSON lines or Hugging Face dataset folders.

A conversation is an object with `messages`, a list of {"role", "content"}, and perhaps
`domain`, `source` and `answer_ids`: the token ids of the last answer where a target
wrote it, which text alone does not determine.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages of one conversation.

    Attributes:
      messages: {"role", "content"} objects, oldest first.
      domain: what it is about, for statistics.
      source: which collection it is from.
      answer_ids: token ids of the last message, an answer; None if not known.
      where: file and line, for error messages.
    """

    messages: tuple[Mapping[str, str], ...]
    domain: str = ""
    source: str = ""
    answer_ids: tuple[int, ...] | None = None
    where: str = ""

    @property
    def first_turn(self) -> tuple[Mapping[str, str], ...]:
        """The messages up to the first of the user; empty if there is none."""
        for index, message in enumerate(self.messages):
            if message["role"] == "user":
                return self.messages[: index + 1]
        return ()

    @property
    def key(self) -> str:
        """Identifies its first turn: equal texts have equal keys."""
        if not self.first_turn:
            return self.where
        text = json.dumps([[m["role"], m["content"].strip()] for m in self.first_turn])
        return sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Problem:
    """A line that holds no conversation, and why."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def read_conversations(
    paths: Iterable[str | Path],
) -> Iterator[Conversation | Problem]:
    """Reads files of JSON lines, or dataset folders, in the given order.

    Raises:
      ValueError: a path does not exist, or a folder is no dataset.
    """
    for path in map(Path, paths):
        if path.is_dir():
            rows: Iterator[Any] = _dataset_rows(path)
        elif path.is_file():
            rows = _json_lines(path)
        else:
            raise ValueError(f"{path}: no such file or folder")
        for number, row in enumerate(rows, 1):
            where = f"{path}:{number}"
            if isinstance(row, str):
                yield Problem(where, row)
            elif row is not None:
                yield _conversation(row, where)


def _json_lines(path: Path) -> Iterator[Any]:
    """The parsed lines; text for one that cannot be, None for an empty one."""
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                yield None
                continue
            try:
                yield json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield f"is not UTF-8 ({error.reason} at byte {error.start})"
            except json.JSONDecodeError as error:
                yield f"is not JSON ({error.msg} at column {error.colno})"


def _dataset_rows(path: Path) -> Iterator[Any]:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{path}: dataset folders need the package `datasets`: "
            "pip install 'jaxspark[train]'"
        ) from None
    saved = (path / "dataset_info.json").is_file() or (
        path / "dataset_dict.json"
    ).is_file()
    try:
        loaded = (
            datasets.load_from_disk(str(path))
            if saved
            else datasets.load_dataset(str(path))
        )
    except Exception as error:  # The library raises many kinds.
        raise ValueError(
            f"{path}: expected a Hugging Face dataset folder, found {error}"
        ) from error
    splits = loaded.values() if isinstance(loaded, dict) else [loaded]
    for split in splits:
        yield from split


def _conversation(row: Any, where: str) -> Conversation | Problem:
    messages = row.get("messages") if isinstance(row, Mapping) else None
    if not isinstance(messages, Sequence) or not messages:
        return Problem(where, 'expected an object with a list "messages"')
    for message in messages:
        texts = isinstance(message, Mapping) and [
            message.get("role"),
            message.get("content"),
        ]
        if not texts or not all(isinstance(text, str) for text in texts):
            return Problem(
                where,
                'expected messages with texts "role" and "content", found '
                f"{str(message)[:80]!r}",
            )
    ids = row.get("answer_ids")
    if ids is not None:
        whole = isinstance(ids, Sequence) and all(
            type(i) is int and i >= 0 for i in ids
        )
        if not whole or not ids or messages[-1]["role"] != "assistant":
            return Problem(
                where, "answer_ids must be token ids of a last message by the assistant"
            )
    return Conversation(
        messages=tuple(messages),
        domain=str(row.get("domain") or ""),
        source=str(row.get("source") or ""),
        answer_ids=None if ids is None else tuple(ids),
        where=where,
    )
