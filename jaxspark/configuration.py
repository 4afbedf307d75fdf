"""Configurations: frozen dataclasses whose fields explain themselves and check values.

    @dataclass(frozen=True, kw_only=True)
    class Load(Configuration):
        slots: int = option("Requests decoded together.", 8, at_least=1)

A field stands once, with its help, default and bounds. Libraries and tests construct
configurations; launchers make flags of them (`jaxspark.launch.program`).
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any


class ConfigurationError(ValueError):
    """A value that an option cannot have; the message begins with the option's name."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """Metadata of a configuration's field.

    Attributes:
      help: one sentence or two, for people.
      at_least, at_most: bounds of a number, or of each of several.
      choices: all values there are; None if there are more.
      may_be_empty: whether an empty text is a value. Elsewhere it is an error: scripts
        write `--name=` when a variable of theirs is not set.
      formerly: an earlier name of the flag, which is still read.
      renamed: earlier names of choices, which are still read.
    """

    help: str
    at_least: float | None = None
    at_most: float | None = None
    choices: Sequence[str] | None = None
    may_be_empty: bool = False
    formerly: str | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)

    def check(self, name: str, value: Any, default: Any) -> None:
        """Raises ConfigurationError unless the value is the default or allowed."""
        if value is None or value == default:
            return
        values = value if isinstance(value, (tuple, list)) else (value,)
        if not self.may_be_empty and (not values or "" in values):
            raise ConfigurationError(
                f"{name} has an empty value; give it one, or leave it out"
            )
        if not all(map(self._allows, values)):
            shown = ",".join(map(str, values))
            raise ConfigurationError(f"{name}={shown}: expected {self.expected()}")

    def _allows(self, value: Any) -> bool:
        if self.choices is not None:
            return value in self.choices
        above = self.at_least is None or value >= self.at_least
        return above and (self.at_most is None or value <= self.at_most)

    def expected(self) -> str:
        """The allowed values, in words; for options with choices or bounds."""
        if self.choices is not None:
            return f"one of {', '.join(self.choices)}"
        if self.at_most is None:
            return f"at least {self.at_least:g}"
        return f"{self.at_least:g} to {self.at_most:g}"


def option(help: str, default: Any = MISSING, **about: Any) -> Any:
    """A field of a configuration; `about` are attributes of `Option`."""
    return field(default=default, metadata={"option": Option(help=help, **about)})


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """The base of configurations: checks every option when it is constructed."""

    def __post_init__(self):
        for each in fields(self):
            if (about := each.metadata.get("option")) is None:
                continue
            value = getattr(self, each.name)
            if isinstance(value, str) and value in about.renamed:
                now = about.renamed[value]
                warnings.warn(f"{each.name}={value} is now called {now}", stacklevel=2)
                object.__setattr__(self, each.name, value := now)
            about.check(each.name, value, each.default)

    def recorded(self, names: Iterable[str]) -> dict[str, Any]:
        """Some values in the form that settings files use: lists of strings."""
        values = {name: getattr(self, name) for name in names}
        return {
            name: list(map(str, value)) if isinstance(value, tuple) else value
            for name, value in values.items()
        }
