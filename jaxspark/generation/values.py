"""Values of requests, as Python's own numbers."""

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class FieldError(ValueError):
    """What is wrong with a field of a request.

    Attributes:
      field: of `SamplingParams`, or "prompt".
    """

    def __init__(self, message: str, field: str):
        super().__init__(message)
        self.field = field


@contextmanager
def about(field: str) -> Iterator[None]:
    """What is wrong within is wrong with this field, unless it says of which."""
    try:
        yield
    except FieldError:
        raise
    except ValueError as error:
        raise FieldError(str(error), field) from error


def whole(name: str, value: Any, least: int, most: int | None) -> int:
    """The value as Python's integer; truth values and 65.0 are none.

    Raises:
      FieldError: it is none, or out of range; errors call it `name`.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        bounds = f"{least} or more" if most is None else f"in {least}..{most}"
        message = f"{name} must be a whole number, {bounds}; got {value!r}"
        raise FieldError(message, _field(name))
    return number


def number(name: str, value: Any, least: float, most: float) -> float:
    """The value as Python's float.

    Raises:
      FieldError: it is none, or out of range; errors call it `name`.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not least <= number <= most:
        message = f"{name} must lie in [{least:g}, {most:g}], got {value!r}"
        raise FieldError(message, _field(name))
    return number


def _field(name: str) -> str:
    """That of a value called "field", or "field: a part of it"."""
    return name.removeprefix("the ").partition(":")[0]
