"""Files of JSON lines: read line by line, or appended to by a program that goes on.

A line ends at a line feed and nowhere else: JSON texts may hold U+2028, U+0085 and
other characters at which `str.splitlines` splits. A line that cannot be read is a
`MalformedRow` of its own and ends nothing.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BOM, _GZIP = b"\xef\xbb\xbf", b"\x1f\x8b"


@dataclass(frozen=True)
class MalformedRow:
    """A line, or a row of a dataset, that cannot be used, and why."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def read_json_lines(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yields ("file:line", value) for every line that is not blank.

    The value is a `MalformedRow` where the line is none. A byte order mark at the
    beginning and carriage returns before line feeds are passed over.

    Raises:
      ValueError: the file is compressed.
      OSError: it cannot be read.
    """
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                if line.startswith(_GZIP):
                    raise ValueError(f"{path}: is compressed by gzip; unpack it first")
                line = line.removeprefix(_BOM)
            if line.strip():
                where = f"{path}:{number}"
                try:
                    yield where, _parse(line)
                except (ValueError, RecursionError) as error:
                    yield where, MalformedRow(where, _reason(error))


def _parse(line: bytes) -> Any:
    """The value of one line; `ValueError` or `RecursionError` if it has none."""
    value = json.loads(line.decode("utf-8"))
    if b"\\ud" in line.lower():
        # An escape may stand for half a character, which is no text.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _reason(error: ValueError | RecursionError) -> str:
    match error:
        case UnicodeDecodeError():
            return f"is not UTF-8 ({error.reason} at byte {error.start})"
        case UnicodeEncodeError():
            half = ord(error.object[error.start])
            return f"holds half of a surrogate pair (\\u{half:x}), which is no text"
        case json.JSONDecodeError():
            message = error.msg.removesuffix(" at")
            return f"is not JSON ({message} at column {error.colno})"
        case RecursionError():
            return "is not JSON that can be read (nested too deep)"
    return f"is not JSON that can be read ({error})"


def first_reasons(problems: Sequence[MalformedRow], most: int = 3) -> str:
    """Problems as one text for people: the first few, and how many more there are."""
    shown = "; ".join(map(str, problems[:most]))
    more = len(problems) - most
    return f"{shown}; and {more} more" if more > 0 else shown


class JsonLines:
    """Entries of a file, old and new; appended as they come.

    A last line without its end is cut off: a program was killed while writing it.

    Args:
      path: of the file.
      writes: False keeps what is added in memory alone: another process of the same job
        writes the file, and has opened it first.
    """

    def __init__(self, path: str | Path, *, writes: bool = True):
        self.path = Path(path)
        self.writes = writes
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.entries: list[Any] = []
        if not self.path.exists():
            return
        if writes:
            self._cut_unfinished_line()
        for _, entry in read_json_lines(self.path):
            if isinstance(entry, MalformedRow):
                raise ValueError(f"{entry}; remove the line, or name another file")
            self.entries.append(entry)

    def _cut_unfinished_line(self) -> None:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.path, whole)

    def add(self, entry: Any) -> None:
        """Appends one entry."""
        self.entries.append(entry)
        if not self.writes:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def keep(self, wanted: Callable[[Any], bool]) -> None:
        """Drops entries that are not wanted, in one step."""
        kept = [entry for entry in self.entries if wanted(entry)]
        changed = len(kept) < len(self.entries)
        self.entries = kept
        if not changed or not self.writes:
            return
        new = self.path.with_name(self.path.name + ".new")
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept]
        new.write_text("".join(lines), encoding="utf-8")
        os.replace(new, self.path)


def check_settings(path: str | Path, settings: dict[str, Any]) -> None:
    """Keeps the settings that something was begun with; they must not change.

    Raises:
      ValueError: they are not those in the file; names which and how.
    """
    path = Path(path)
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is damaged ({error})") from error
    changed = [
        f"{name} was {old.get(name)!r}, now {settings.get(name)!r}"
        for name in sorted({*old, *settings})
        if old.get(name) != settings.get(name)
    ]
    if changed:
        raise ValueError(
            f"{path}: begun with other settings ({'; '.join(changed)}); choose another "
            "place, or remove what is there"
        )
