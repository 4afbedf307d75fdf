"""Reads compiled HLO: which large arrays does a program make anew?

An instruction passes a value on (tuples, bitcasts, loops), changes it where it lies
(scatter, dynamic-update-slice) or makes a new array; a fusion makes only its last.
Where a buffer cannot be shared, since the old value is still needed, XLA inserts a
`copy`. So a cache is copied exactly where an array of its size is new: by a copy or a
transpose, but also by a convert or a select over all of it.
"""

import math
import re

IN_PLACE = {"scatter", "dynamic-update-slice"}
# Starts of asynchronous slices carry their operand; the slice itself is what is new.
PASSES_ON = {
    *("parameter", "tuple", "get-tuple-element", "bitcast", "opt-barrier"),
    *("while", "conditional", "call", "copy-done", "slice-start", "slice-done"),
}
HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+).*\{$")
LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?)([a-z][a-z\-]*)\((.*)$")
SHAPE = re.compile(r"[a-z]+\d*\w*\[([\d,]*)\]")
NAME = re.compile(r"%?([\w.\-]+)")


class Instruction:
    """One line of a computation."""

    def __init__(self, line: str, match: re.Match):
        self.line = line.strip()
        self.root, self.name, shapes, self.opcode, self.rest = match.groups()
        self.sizes = [
            math.prod(int(n) for n in dims.split(",") if n)
            for dims in SHAPE.findall(shapes)
        ]

    @property
    def operands(self) -> list[str]:
        """Names of its operands, where these are plain names."""
        return NAME.findall(self.rest.split(")")[0])

    @property
    def callee(self) -> str | None:
        """The computation a fusion runs."""
        called = re.search(r"calls=%?([\w.\-]+)", self.rest)
        return called[1] if called and self.opcode == "fusion" else None


def computations(text: str) -> dict[str, dict[str, Instruction]]:
    """Instructions by name, of every computation by name."""
    found: dict[str, dict[str, Instruction]] = {}
    for line in text.splitlines():
        if (header := HEADER.match(line)) and not line[0].isspace():
            body = found.setdefault(header[1], {})
        elif match := LINE.match(line):
            instruction = Instruction(line, match)
            body[instruction.name] = instruction
    return found


def new_arrays(text: str, size: int) -> list[str]:
    """Lines of the program that make an array of `size` elements or more."""
    program = computations(text)
    bodies = [body.values() for body in program.values()]
    fused = {line.callee for body in bodies for line in body}

    def is_new(instruction, body):
        if max(instruction.sizes, default=0) < size or instruction.opcode in IN_PLACE:
            return False
        if instruction.callee:
            inner = program[instruction.callee]
            return any(ends_new(line, inner) for line in inner.values() if line.root)
        if "ConcatBitcast" in instruction.rest:  # pieces that already lie in a row
            return False
        return instruction.opcode not in PASSES_ON

    def ends_new(instruction, body):
        if instruction.opcode in ("tuple", "bitcast"):
            sources = [body[name] for name in instruction.operands if name in body]
            return any(ends_new(source, body) for source in sources)
        return is_new(instruction, body)

    return [
        line.line
        for name, body in program.items()
        if name not in fused
        for line in body.values()
        if is_new(line, body)
    ]
