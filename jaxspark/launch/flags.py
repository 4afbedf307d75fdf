"""Flags of a configuration: absl reads them, the configuration checks them.

Libraries that parse dataclasses (tyro 1.0, draccus 0.11, simple_parsing 0.1) refuse
`--slots=1,2`, the first two `--noflag` as well, which people have in scripts.
"""

import csv
import sys
import types
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, get_args, get_origin, get_type_hints

from absl import flags

from jaxspark.configuration import Configuration, ConfigurationError, Option


def parse[C: Configuration](
    config: type[C], arguments: Sequence[str], launcher: str
) -> C:
    """The configuration that a command line says.

    Args:
      config: the launcher's configuration.
      arguments: the command line behind the launcher's name.
      launcher: its name, for messages.

    Raises:
      ValueError: an argument that is no flag, a flag that is unknown, is missing or
        cannot have its value; names it and what is expected.
    """
    values = define(config, launcher)
    try:
        rest = values([launcher, *_renamed(config, arguments)])[1:]
    except flags.Error as error:
        message = str(error).removeprefix("flag ")
        raise ValueError(f"{message} (see jaxspark {launcher} --help)") from error
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}; all are --flags")
    given = {name: values[name].value for name in values if values[name].present}
    missing = [
        f"--{each.name}"
        for each in _options(config)
        if each.default is MISSING and each.name not in given
    ]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} must be given (see jaxspark {launcher} --help)"
        )
    try:
        return config(**given)
    except ConfigurationError as error:
        raise ValueError(f"--{error}") from error


def help_text(config: type[Configuration], launcher: str) -> str:
    """All flags with their help and defaults."""
    return define(config, launcher).module_help(_title(launcher))


def define(config: type[Configuration], launcher: str) -> flags.FlagValues:
    """A flag for every option, apart from absl's own and those of other launchers."""
    values, annotations = flags.FlagValues(), get_type_hints(config)
    for each in _options(config):
        about: Option = each.metadata["option"]
        kind, several = _kind(annotations[each.name])
        shared: dict[str, Any] = {
            "name": each.name,
            "default": None if each.default is MISSING else each.default,
            "help": about.help,
            "flag_values": values,
            "module_name": _title(launcher),
        }
        if each.default is MISSING:
            shared["help"] += " (required)"
        if about.at_least is not None:
            shared["help"] += f" ({about.expected()})"
        if about.choices is not None:
            shared["help"] = f"<{'|'.join(about.choices)}>: {shared['help']}"
        if kind is bool:
            flags.DEFINE_boolean(**shared)
        else:
            flags.DEFINE(
                _Parser(kind, several),
                serializer=_CommaList() if several else None,
                **shared,
            )
    return values


def _title(launcher: str) -> str:
    return f"flags of jaxspark {launcher}"


def _options(config: type[Configuration]) -> list[Field]:
    return [each for each in fields(config) if "option" in each.metadata]


def _kind(annotation: Any) -> tuple[type, bool]:
    """The type of an option's value, and whether it has several of that."""
    if get_origin(annotation) is types.UnionType:
        [annotation] = (a for a in get_args(annotation) if a is not types.NoneType)
    several = get_origin(annotation) is tuple
    if several:
        annotation = get_args(annotation)[0]
    # Anything else is the Literal type of an option's choices.
    return annotation if annotation in (bool, int, float) else str, several


def _renamed(config: type[Configuration], arguments: Sequence[str]) -> list[str]:
    """The arguments under today's names; says where an earlier one was used."""
    today = {each.metadata["option"].formerly: each.name for each in _options(config)}
    renamed = []
    for each in arguments:
        name, equals, value = each.removeprefix("--").partition("=")
        if each.startswith("--") and name in today:
            print(f"--{name} is now called --{today[name]}", file=sys.stderr)
            each = f"--{today[name]}{equals}{value}"
        renamed.append(each)
    return renamed


class _Parser(flags.ArgumentParser):
    """Reads one value, or several with commas between."""

    def __init__(self, kind: type, several: bool):
        super().__init__()
        self.kind, self.several = kind, several

    def parse(self, argument: Any) -> Any:
        """The value of a text; raises ValueError if it has none."""
        if not isinstance(argument, str):
            return argument
        if not self.several:
            return self._one(argument)
        row = next(csv.reader([argument], strict=True), [])
        return tuple(self._one(each.strip()) for each in row)

    def _one(self, text: str) -> Any:
        try:
            return self.kind(text)
        except ValueError:
            expected = {int: "a whole number", float: "a number"}[self.kind]
            instead = f", got {text!r}" if self.several else ""
            raise ValueError(f"expected {expected}{instead}") from None

    def flag_type(self) -> str:
        """For absl."""
        return self.kind.__name__


class _CommaList(flags.ArgumentSerializer):
    def serialize(self, value: Any) -> str:
        """The text that `_Parser` reads."""
        return ",".join(map(str, value))
