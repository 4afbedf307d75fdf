"""`--help` tells all that a launcher obeys, and nothing else."""

import ast
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType

import pytest

from jaxspark.__main__ import LAUNCHERS
from jaxspark.launch import common, devices, program, study
from jaxspark.launch.flags import define


def load(name: str):
    return importlib.import_module(f"jaxspark.launch.{name}")


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help_lists_every_option_with_its_default(name, monkeypatch, capsys):
    launcher = load(name)
    monkeypatch.setattr(sys, "argv", ["jaxspark", "--help"])
    with pytest.raises(SystemExit) as end:
        program.run(launcher.main, launcher.Config)
    assert not end.value.code
    text = capsys.readouterr().out
    about, title, described = text.partition(f"flags of jaxspark {name}:")
    assert f"jaxspark {name} --" in about and title and "launch." not in text
    ours = define(launcher.Config, name)
    assert set(ours) == {each.name for each in fields(launcher.Config)}
    # Of each flag's lines, without the white space that they were wrapped at.
    entries = [
        "".join(each.split()) for each in re.split(r"^  --", described, flags=re.M)
    ]
    assert len(entries) == len(list(ours)) + 1
    for each in fields(launcher.Config):
        flag = ours[each.name]
        label = f"[no]{flag.name}:" if flag.boolean else f"{flag.name}:"
        [entry] = [entry for entry in entries if entry.startswith(label)]
        assert "".join(each.metadata["option"].help.split()) in entry
        if flag.default is not None:
            assert f"(default:{flag.default_as_str})" in entry


@pytest.mark.parametrize("name", LAUNCHERS)
def test_no_option_is_shown_and_not_obeyed(name):
    """It is read where the launcher is, or in a module that the launcher imports."""
    launcher = load(name)
    source = Path(launcher.__file__).read_text("utf-8")
    names = re.findall(r"^ *from (jaxspark\.[\w.]+) import", source, re.M)
    modules = [launcher, common, devices, *map(importlib.import_module, names)]
    read = set().union(*map(options_read, modules))
    assert {each.name for each in fields(launcher.Config)} <= read


def options_read(module: ModuleType) -> Iterator[str]:
    """`config.name`, and all names of a class whose fields are copied from it."""
    for node in ast.walk(ast.parse(Path(module.__file__).read_text("utf-8"))):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "config" | "options")):
                yield node.attr
            case ast.Call(func=ast.Name(id="fields"), args=[ast.Name(id=copied)]):
                yield from (
                    each.name for each in fields(getattr(module, copied, Nothing))
                )


@dataclass
class Nothing:
    """Stands for what is no class of a module: a parameter."""


def test_a_study_reads_the_flags_of_the_commands_it_is_made_of():
    example = re.search(r'--train="(.*?)"', study.__doc__)[1]
    config = study.Config(suite="depth", out="x", train=f"{example} --depth=1")
    runs = {name: (where, run) for name, where, run in study.variants(config)}
    assert [run.depth for _, run in runs.values()] == [1, 2, 3]
    assert [str(where) for where, _ in runs.values()] == [
        *("x/base", "x/depth/2", "x/depth/3"),
    ]
    assert all(run.draft_vocab == 8192 for _, run in runs.values())
    assert shlex.split(example)[0] == "--data=answers.jsonl"
