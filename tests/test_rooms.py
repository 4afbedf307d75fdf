"""Rooms import downwards: from programs to what they measure, then to the library."""

import ast
from pathlib import Path

import jaxspark

FOLDER = Path(jaxspark.__file__).parent
# From the top; all other rooms lie below these.
ROOMS = (
    *("__main__", "launch", "benchmark", "exactness"),
    *("evaluation", "simulation", "training"),
)


def imported(path: Path) -> set[str]:
    """The rooms that a module imports from, wherever it does."""
    tree = ast.walk(ast.parse(path.read_text("utf-8")))
    names = {node.module or "" for node in tree if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[1] for name in names if name.startswith("jaxspark.")}


def test_no_room_imports_from_one_above_it():
    upward = []
    for path in FOLDER.rglob("*.py"):
        room = path.relative_to(FOLDER).parts[0].removesuffix(".py")
        rank = ROOMS.index(room) if room in ROOMS else len(ROOMS)
        above = imported(path) & set(ROOMS[:rank])
        upward += [f"{path.relative_to(FOLDER)} imports {each}" for each in above]
    assert not upward


def test_files_are_short_and_launchers_thin():
    lengths = {
        path.relative_to(FOLDER): path.read_text("utf-8").count("\n")
        for path in FOLDER.rglob("*.py")
    }
    launchers = {p: n for p, n in lengths.items() if p.parts[0] == "launch"}
    assert sum(launchers.values()) <= 1800 and max(launchers.values()) <= 200
