"""Files of JSON lines that a stopped program goes on with."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class JsonLines:
    """Entries of a file, old and new; appended as they come.

    A last line without its end is cut off: a program was killed while writing it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.entries: list[Any] = []
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.path, whole)
        self.entries = [
            self._parse(number, line)
            for number, line in enumerate(data[:whole].splitlines(), 1)
        ]

    def _parse(self, number: int, line: bytes) -> Any:
        try:
            return json.loads(line.decode("utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{self.path}:{number}: is not JSON ({error}); remove the line, or "
                "name another file"
            ) from error

    def add(self, entry: Any) -> None:
        """Appends one entry."""
        self.entries.append(entry)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def keep(self, wanted: Callable[[Any], bool]) -> None:
        """Drops entries that are not wanted, in one step."""
        kept = [entry for entry in self.entries if wanted(entry)]
        if len(kept) == len(self.entries):
            return
        new = self.path.with_name(self.path.name + ".new")
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept]
        new.write_text("".join(lines), encoding="utf-8")
        os.replace(new, self.path)
        self.entries = kept


def same_settings(path: str | Path, settings: dict[str, Any]) -> None:
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
