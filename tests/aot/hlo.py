"""Reads compiled HLO: which large arrays does a program make anew?

An instruction passes a value on (tuples, bitcasts, loops), changes it where it lies
(scatter, dynamic-update-slice) or makes a new array; a fusion makes only its last.
Where a buffer cannot be shared, since the old value is still needed, XLA inserts a
`copy`. So a cache is copied exactly where an array of its size is new: by a copy or a
transpose, but also by a convert or a select over all of it.
"""

import math

from jaxspark.simulation.hlo import Program

# Custom calls that are Pallas kernels.
KERNELS = ("tpu_custom_call", "mosaic_gpu_v2")
IN_PLACE = {"scatter", "dynamic-update-slice"}
# Starts of asynchronous slices carry their operand; the slice itself is what is new.
PASSES_ON = {
    *("parameter", "tuple", "get-tuple-element", "bitcast", "opt-barrier"),
    *("while", "conditional", "call", "copy-done", "slice-start", "slice-done"),
}
COLLECTIVES = {"all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"}


def work_meanwhile(text: str, scope: str) -> dict[str, bool]:
    """Of exchanges under way: whether something of a named scope runs meanwhile.

    A compiled program's lines are in the order in which they are started.
    """
    seen: dict[str, bool] = {}
    for body in Program.of(text).computations.values():
        under_way: dict[str, bool] = {}
        for line in body.values():
            kind, _, end = line.opcode.rpartition("-")
            if kind in COLLECTIVES and end == "start":
                under_way[line.name] = False
            elif kind in COLLECTIVES and end == "done":
                [name] = line.operands
                seen[name] = under_way.pop(name)
            elif f"/{scope}/" in line.attributes:
                under_way = dict.fromkeys(under_way, True)
    return seen


def kernels_of(text: str, scope: str) -> list[str]:
    """Names of the Pallas kernels that a compiled program calls in a named scope."""
    scopes = [
        line.origin.split("/")
        for body in Program.of(text).computations.values()
        for line in body.values()
        if any(f'custom_call_target="{name}"' in line.attributes for name in KERNELS)
    ]
    # The last is how it is called.
    return [within[-2] for within in scopes if scope in within]


def branches_of(program: Program, scope: str) -> set[str]:
    """Branches that do something of a named scope, and all that they call."""
    todo = [
        callee
        for body in program.computations.values()
        for line in body.values()
        if line.opcode == "conditional"
        for callee in line.callees(
            "branch_computations", "true_computation", "false_computation"
        )
        if any(
            f"/{scope}/" in each.origin
            for each in program.computations[callee].values()
        )
    ]
    found: set[str] = set()
    while todo:
        name = todo.pop()
        if name in found or name not in program.computations:
            continue
        found.add(name)
        for line in program.computations[name].values():
            todo += line.callees(
                *("branch_computations", "true_computation", "false_computation"),
                *("body", "condition", "calls", "to_apply", "called_computations"),
            )
    return found


def new_arrays(text: str, size: int, *, without: str | None = None) -> list[str]:
    """Lines of the program that make an array of `size` elements or more.

    Args:
      text: of the compiled program.
      size: elements.
      without: a named scope; branches that have it are left out.
    """
    program = Program.of(text)
    left_out = set() if without is None else branches_of(program, without)
    fused = {
        callee
        for body in program.computations.values()
        for line in body.values()
        if line.opcode == "fusion"
        for callee in line.callees("calls")
    }

    def is_new(line):
        largest = max((math.prod(each.shape) for each in line.arrays), default=0)
        if largest < size or line.opcode in IN_PLACE:
            return False
        if line.opcode == "fusion" and (inner := program.inside(line)):
            return any(ends_new(each, inner) for each in inner.values() if each.root)
        if "ConcatBitcast" in line.attributes:  # pieces that already lie in a row
            return False
        if "output_to_operand_aliasing" in line.attributes:  # kernels write in place
            return False
        return line.opcode not in PASSES_ON

    def ends_new(line, body):
        if line.opcode in ("tuple", "bitcast"):
            sources = [body[name] for name in line.operands if name in body]
            return any(ends_new(source, body) for source in sources)
        return is_new(line)

    return [
        f"%{line.name} = {line.type} {line.opcode}({line.arguments}){line.attributes}"
        for name, body in program.computations.items()
        if name not in fused | left_out
        for line in body.values()
        if is_new(line)
    ]
