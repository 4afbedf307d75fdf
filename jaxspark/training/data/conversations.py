"""Conversations from JSON lines or Hugging Face dataset folders.

A conversation is an object with `messages`, a list of {"role", "content"}, and perhaps
`tools`, `domain`, `source` and `answer_ids`: the token ids of the last answer where a
target wrote it, which text alone does not determine. An answer that calls tools may
have no content. Other keys of a message reach the chat template.
"""

import json
import reprlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from jaxspark.jsonlines import MalformedRow, read_json_lines

_MOST_ID = 2**31 - 1  # ids are int32 on the device


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages of one conversation.

    Attributes:
      messages: {"role", "content"} objects, oldest first.
      tools: schemas of the functions that the assistant may call; None for none.
      domain: what it is about, for statistics.
      source: which collection it is from.
      answer_ids: token ids of the last message, an answer; None if not known.
      where: file and line, for error messages.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: Sequence[Any] | None = None
    domain: str = ""
    source: str = ""
    answer_ids: tuple[int, ...] | None = None
    where: str = ""

    @property
    def first_turn(self) -> tuple[Mapping[str, Any], ...]:
        """The messages up to the first of the user; empty if there is none."""
        for index, message in enumerate(self.messages):
            if message["role"] == "user":
                return self.messages[: index + 1]
        return ()

    @property
    def key(self) -> str:
        """Identifies its first turn: equal texts and tools have equal keys."""
        if not self.first_turn:
            return self.where
        asked: list[Any] = [
            [m["role"], (m["content"] or "").strip()] for m in self.first_turn
        ]
        text = json.dumps([*asked, self.tools] if self.tools else asked)
        return sha256(text.encode()).hexdigest()[:16]


def read_conversations(
    paths: Iterable[str | Path],
) -> Iterator[Conversation | MalformedRow]:
    """Reads files of JSON lines, or dataset folders, in the given order.

    Of a dataset with several splits only `train` is read; the others are named in a
    warning.

    Raises:
      ValueError: a path does not exist, or a folder is no dataset or one of several
        splits without `train`.
    """
    for path in map(Path, paths):
        if path.is_dir():
            rows = _dataset_rows(path)
        elif path.is_file():
            rows = read_json_lines(path)
        else:
            raise ValueError(f"{path}: no such file or folder")
        for where, row in rows:
            yield row if isinstance(row, MalformedRow) else _conversation(row, where)


def _dataset_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows to train on: what its makers held out stays held out."""
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{path}: dataset folders need the package `datasets`: "
            "pip install 'jaxspark[train]'"
        ) from None
    saved = any(
        (path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")
    )
    try:
        if saved:
            loaded = datasets.load_from_disk(str(path))
            splits = loaded if isinstance(loaded, dict) else {"train": loaded}
        else:
            # Which files are of which split; nothing is read yet.
            splits = datasets.load_dataset_builder(str(path)).config.data_files
        split = _training_split(path, [str(name) for name in splits])
        files = [] if saved else [Path(file) for file in splits[split]]
        if files and all(file.suffix == ".jsonl" for file in files):
            # Line by line: the library fails as a whole for one line that is bad.
            for file in files:
                yield from read_json_lines(file)
            return
        rows = splits[split] if saved else datasets.load_dataset(str(path), split=split)
    except _NoSplit:
        raise
    except Exception as error:  # The library raises many kinds.
        raise ValueError(
            f"{path}: expected a Hugging Face dataset folder, found {error}"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{path}:{number}", row


class _NoSplit(ValueError):
    """A dataset folder does not say what to train on."""


def _training_split(path: Path, names: Sequence[str]) -> str:
    """`train`, or the only split there is; names in a warning what is left out."""
    if "train" not in names and len(names) != 1:
        raise _NoSplit(
            f"{path}: has the splits {', '.join(names)}, expected train among them, or "
            "one split alone; give the folder or the files of the one to read"
        )
    chosen = "train" if "train" in names else names[0]
    others = ", ".join(name for name in names if name != chosen)
    if others:
        warnings.warn(f"{path}: {chosen} is read, {others} left out", stacklevel=2)
    elif chosen != "train":
        warnings.warn(f"{path}: {chosen} is read, the only split", stacklevel=2)
    return chosen


def _conversation(row: Any, where: str) -> Conversation | MalformedRow:
    messages = row.get("messages") if isinstance(row, Mapping) else None
    if not isinstance(messages, Sequence) or not messages:
        return MalformedRow(where, 'expected an object with a list "messages"')
    for message in messages:
        if not _is_message(message):
            return MalformedRow(
                where,
                'expected messages with texts "role" and "content", found '
                f"{reprlib.repr(message)}",
            )
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        return MalformedRow(where, f"tools must be a list, found {reprlib.repr(tools)}")
    ids = row.get("answer_ids")
    if ids is not None:
        whole = isinstance(ids, Sequence) and all(
            type(i) is int and 0 <= i <= _MOST_ID for i in ids
        )
        if not whole or not ids or messages[-1]["role"] != "assistant":
            return MalformedRow(
                where, "answer_ids must be token ids of a last message by the assistant"
            )
    return Conversation(
        messages=tuple(messages),
        tools=tools or None,
        domain=str(row.get("domain") or ""),
        source=str(row.get("source") or ""),
        answer_ids=None if ids is None else tuple(ids),
        where=where,
    )


def _is_message(message: Any) -> bool:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return False
    # As in the APIs that record such calls, their text may be null.
    silent = message.get("content", "") is None and message.get("tool_calls")
    return isinstance(message.get("content"), str) or bool(silent)
