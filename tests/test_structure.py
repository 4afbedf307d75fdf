"""The import graph: rooms depend on each other one way, modules in no circle."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the command line down. A room imports those after it, never those before.
ROOMS = (
    "__main__",
    "launch",
    "pods",
    "benchmark",
    "tuning",
    "serving",
    "exactness",
    "simulation",
    "evaluation",
    "training",
    "calibration",
    "generation",
    "checkpoints",
    "target",
    "grammars",
    "text",
    "quantization",
    "decoding",
    "configs",
    "drafters",
    "models",
    "parallel",
)
# Small modules that any room may import, and that import no room.
SHARED = {
    "configuration",
    "errors",
    "figures",
    "jsonlines",
    "progress",
    "settings",
    "timing",
}


def modules():
    found = {}
    for package in ("jaxspark", "pallas_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports():
    """Every import of a module of ours, those inside functions too."""
    graph = defaultdict(set)
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                wanted = [f"{node.module}.{each.name}" for each in node.names]
            elif isinstance(node, ast.Import):
                wanted = [each.name for each in node.names]
            else:
                continue
            for full in wanted:
                while full and full not in MODULES:
                    full = full.rpartition(".")[0]
                if full and full != name:
                    graph[name].add(full)
    return graph


GRAPH = imports()


def room(module):
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == "jaxspark" else package


def test_every_module_has_its_room():
    rooms = {room(name) for name in MODULES} - {"", "pallas_kernels", "weights"}
    assert rooms == set(ROOMS) | SHARED


def test_imports_point_one_way():
    upward = []
    for module in MODULES:
        here = room(module)
        if not here:  # The package itself names what users import, late.
            continue
        allowed = {here} | SHARED
        if here == "pallas_kernels":
            allowed = {here}
        elif here in ROOMS:
            allowed |= {"", "pallas_kernels", *ROOMS[ROOMS.index(here) :]}
        upward += [
            f"{module} imports {each}"
            for each in GRAPH[module]
            if room(each) not in allowed
        ]
    assert not upward


def test_no_module_imports_itself_in_a_circle():
    done, path = set(), []

    def visit(module):
        if module in path:
            circle = [*path[path.index(module) :], module]
            # A package and the modules it gathers name each other.
            tidy = [each for each in circle if not _gathers(each)]
            assert len(tidy) < 2, " -> ".join(circle)
            return
        if module in done:
            return
        path.append(module)
        for each in sorted(GRAPH[module]):
            visit(each)
        path.pop()
        done.add(module)

    for module in sorted(MODULES):
        visit(module)


def _gathers(module):
    return MODULES[module].name == "__init__.py"
