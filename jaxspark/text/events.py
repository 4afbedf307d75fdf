"""What an output says, in the order in which it says it: the words parsers speak.

The texts of neighbouring events of a kind may be joined or cut anywhere without a
change of meaning; `joined` does the former.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Reasoning:
    """Text inside a think block."""

    text: str


@dataclass(frozen=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True)
class CallBegins:
    """A call of a tool by name; its arguments follow."""

    name: str


@dataclass(frozen=True)
class Arguments:
    """More of the running call's arguments, which are one JSON object."""

    text: str


@dataclass(frozen=True)
class CallEnds:
    """The running call is whole. One that breaks off never ends."""


Event = Reasoning | Content | CallBegins | Arguments | CallEnds


def joined(events: Iterable[Event]) -> list[Event]:
    """The events without empty texts, neighbours of a kind made one."""
    result: list[Event] = []
    for event in events:
        if isinstance(event, CallBegins | CallEnds):
            result.append(event)
        elif event.text:
            last = result[-1] if result else None
            if isinstance(last, type(event)) and not isinstance(
                last, CallBegins | CallEnds
            ):
                result[-1] = type(event)(last.text + event.text)
            else:
                result.append(event)
    return result
