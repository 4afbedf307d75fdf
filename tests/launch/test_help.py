"""`--help` tells all that a launcher obeys, and nothing else."""

import ast
import re
from pathlib import Path

import pytest
from absl import flags

from jaxspark.__main__ import LAUNCHERS
from jaxspark.launch import program
from tests.programs import ROOT

FOLDER = Path(program.__file__).parent


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help_lists_every_flag_with_its_default(name, load, capsys):
    launcher = load(name)
    with pytest.raises(SystemExit) as end:
        program.parse(launcher, ["jaxspark", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    about, title, described = text.partition(f"flags of jaxspark {name}:")
    assert f"jaxspark {name} --" in about and title and "launch." not in text
    ours = [
        flags.FLAGS[flag]
        for flag in flags.FLAGS
        if flags.FLAGS.find_module_defining_flag(flag).startswith("jaxspark.")
    ]
    assert ours
    # Of each flag's lines, without the white space that they were wrapped at.
    entries = [
        "".join(each.split()) for each in re.split(r"^  --", described, flags=re.M)
    ]
    assert len(entries) == len(ours) + 1
    for flag in ours:
        label = f"[no]{flag.name}:" if flag.boolean else f"{flag.name}:"
        [entry] = [each for each in entries if each.startswith(label)]
        assert "".join(flag.help.split()) in entry
        if flag.default is not None:
            assert f"(default:{flag.default_as_str})" in entry


def functions(module: str) -> dict[str, str]:
    """Source of every function of a module of launchers."""
    source = (FOLDER / f"{module}.py").read_text("utf-8")
    return {
        node.name: ast.get_source_segment(source, node)
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("name", LAUNCHERS)
def test_no_shared_flag_is_shown_and_not_obeyed(name, load):
    load(name)
    modules = flags.FLAGS.flags_by_module_dict()
    shared = {flag.name for flag in modules.get("jaxspark.launch.common", ())}
    # The launcher, its helper modules, and what they call of the common one.
    called = functions("common")
    source = (FOLDER / f"{name}.py").read_text("utf-8")
    assert bool(shared) == ("common.define_" in source)
    stems = {path.stem for path in FOLDER.glob("*.py")} - {"common", *LAUNCHERS}
    todo = [source]
    read, seen = "", set()
    while todo:
        read += (text := todo.pop())
        for helper in stems & set(re.findall(r"jaxspark\.launch\.(\w+) import", text)):
            todo.append((FOLDER / f"{helper}.py").read_text("utf-8"))
            stems.remove(helper)
        for function in set(re.findall(r"(\w+)\(", text)) & set(called) - seen:
            seen.add(function)
            if not function.startswith("define_"):
                todo.append(called[function])
    for flag in shared:
        assert re.search(rf'FLAGS\.{flag}\b|"{flag}"', read), flag


def commands() -> list[str]:
    """Every command in the README that starts a launcher."""
    text = (ROOT / "README.md").read_text("utf-8").replace("\\\n", " ")
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [
        found[1]
        for each in lines + inline
        if (found := re.match(r"(?:\$ )?(?:python -m )?jaxspark (\w+.*)", each))
    ]


def test_commands_of_the_readme_exist(load):
    seen = set()
    for command in commands():
        name = command.split()[0]
        if name == "NAME":
            continue
        assert name in LAUNCHERS, command
        seen.add(name)
        # Flags in quotes are another launcher's.
        given = re.findall(r"--(?:no)?(\w+)", re.sub(r'"[^"]*"?', "", command))
        load(name)
        for flag in set(given) - {"help"}:
            assert flag in flags.FLAGS, command
    assert len(seen) > 8
