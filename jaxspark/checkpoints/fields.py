"""Typed reading of JSON configurations: every wrong value is named.

`Fields` wraps one JSON object. Its getters return a value of the asked type or raise
`CheckpointError` with the file, the key, the value seen and what was expected.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxspark.errors import CheckpointError

_REQUIRED: Any = object()
_MOST = 2**31 - 1  # ids, sizes and positions are int32 on the device


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; `CheckpointError` if absent, broken or no object."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object, found {type(value).__name__}"
        )
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes `value` indented, keys in the given order."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Fields:
    """The values of one JSON object or metadata table; `where` names it in errors."""

    values: Mapping[str, Any]
    where: str

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def wrong(self, key: str, expected: str) -> CheckpointError:
        """The error for a bad value of `key`."""
        seen = repr(self.values[key]) if key in self.values else "missing"
        return CheckpointError(f"{self.where}: {key} is {seen}, expected {expected}")

    def _value(self, key: str, default: Any, expected: str) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise self.wrong(key, expected)
        return default

    def integer(self, key: str, default: Any = _REQUIRED, *, least: int = 1) -> int:
        """An integer from `least` to 2^31 - 1; null counts as absent."""
        expected = f"an integer of at least {least}"
        value = self._value(key, default, expected)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, expected)
        if not least <= value <= _MOST:
            raise self.wrong(key, f"{expected}, and below 2^31")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A positive finite number."""
        expected = "a positive number"
        value = self._value(key, default, expected)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, expected)
        if not 0 < value <= sys.float_info.max:
            raise self.wrong(key, expected)
        return float(value)

    def boolean(self, key: str, default: Any = _REQUIRED) -> bool:
        """A boolean."""
        value = self._value(key, default, "true or false")
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        """A string."""
        value = self._value(key, default, "a string")
        if value is not default and not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def integers(self, key: str, default: Any = _REQUIRED) -> tuple[int, ...]:
        """A list of integers."""
        value = self._value(key, default, "a list of integers")
        if value is default:
            return value
        if not isinstance(value, list) or any(
            isinstance(item, bool) or not isinstance(item, int) or abs(item) > _MOST
            for item in value
        ):
            raise self.wrong(key, "a list of integers")
        return tuple(value)

    def table(self, key: str) -> "Fields | None":
        """A nested object, None where absent."""
        value = self._value(key, None, "an object")
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Fields(value, f"{self.where}: {key}")
