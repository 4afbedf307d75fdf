"""README and documentation name only what exists."""

import ast
import importlib
import re
from dataclasses import fields

import pytest

from jaxspark.__main__ import LAUNCHERS
from jaxspark.checkpoints.load import SHIPPED_DRAFTERS
from tests.programs import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
CARDS = [folder / "README.md" for folder in SHIPPED_DRAFTERS.values()]
FENCED = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


def commands() -> list[str]:
    """Every command that starts a launcher, as in `jaxspark NAME --flag=value`."""
    found = []
    for page in PAGES + CARDS:
        text = page.read_text("utf-8").replace("\\\n", " ")
        lines = [
            line for _, block in FENCED.findall(text) for line in block.split("\n")
        ]
        inline = re.findall(r"`([^`\n]+)`", FENCED.sub("", text))
        starts = (
            re.match(r"jaxspark (\w+.*)", line.strip()) for line in lines + inline
        )
        found += [start[1] for start in starts if start]
    return found


def test_commands_exist_with_their_flags():
    seen = set()
    for command in commands():
        name = command.split()[0]
        if name == "NAME":
            continue
        assert name in LAUNCHERS, command
        seen.add(name)
        # Flags in quotes are another launcher's.
        given = re.findall(r"--(?:no)?(\w+)", re.sub(r'"[^"]*"?', "", command))
        config = importlib.import_module(f"jaxspark.launch.{name}").Config
        known = {each.name for each in fields(config)} | {"help"}
        assert set(given) <= known, command
    assert len(seen) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_imports_what_exists(page):
    for language, block in FENCED.findall(page.read_text("utf-8")):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), ast.unparse(node)


def test_the_readme_is_short():
    assert len(README.read_text("utf-8").splitlines()) <= 150
