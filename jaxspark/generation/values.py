"""Values of requests, as Python's own numbers."""

import operator
from typing import Any


def whole(name: str, value: Any, least: int, most: int | None) -> int:
    """The value as Python's integer; truth values and 65.0 are none.

    Raises:
      ValueError: it is none, or out of range; errors call it `name`.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        bounds = f"{least} or more" if most is None else f"in {least}..{most}"
        raise ValueError(f"{name} must be a whole number, {bounds}; got {value!r}")
    return number


def number(name: str, value: Any, least: float, most: float) -> float:
    """The value as Python's float.

    Raises:
      ValueError: it is none, or out of range; errors call it `name`.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not least <= number <= most:
        raise ValueError(f"{name} must lie in [{least:g}, {most:g}], got {value!r}")
    return number
