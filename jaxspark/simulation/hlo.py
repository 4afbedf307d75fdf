"""Compiled programs as text (HLO), read for what they do and how often.

A program is a list of computations; one of them is the entry. Loops, branches and calls
name others, and a fusion is one instruction whose computation makes no arrays of its
own but its result. Loops that XLA knows the trip count of say it.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?)\s?([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_TRIPS = re.compile(r'known_trip_count"?[:=]\s*\{"?n"?[:=]"?(\d+)')
_CALLS = {"call", "async-start", "call-start", "custom-call-start"}
_BITS = {"pred": 8, "bf16": 16, "token": 0}


@dataclass(frozen=True)
class Array:
    """Type, shape and layout of one array of a program."""

    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def nbytes(self) -> float:
        """Its size."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            found = re.search(r"\d+", self.dtype)
            bits = int(found[0]) if found else 32
        return math.prod(self.shape) * bits / 8

    @property
    def in_main_memory(self) -> bool:
        """Whether it lies there, and not in a TPU's vector memory."""
        return "S(" not in self.layout


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: within its computation.
      type: of its result, as text.
      opcode: what it does.
      operands: names of what it reads.
      arguments: the operands as text; of a parameter its number.
      attributes: everything behind the operands.
      root: whether it is its computation's result.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    root: bool

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        """Those of its result."""
        return tuple(
            Array(dtype, tuple(int(n) for n in dims.split(",") if n), layout or "")
            for dtype, dims, layout in _ARRAY.findall(self.type)
        )

    def callees(self, *names: str) -> list[str]:
        """The computations that some of its attributes name."""
        found = []
        for name in names:
            for one, several in re.findall(
                rf"\b{name}=(?:%?([\w.\-]+)|\{{(.*?)\}})", self.attributes
            ):
                found += [one] if one else re.findall(r"[\w.\-]+", several)
        return found

    @property
    def origin(self) -> str:
        """The named scopes it was traced in."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]


@dataclass
class Program:
    """Instructions by name, of every computation by name."""

    computations: dict[str, Computation] = field(default_factory=dict)
    entry: str = ""

    @classmethod
    def of(cls, text: str) -> "Program":
        """Reads what `compiled.as_text()` gives."""
        program, body = cls(), Computation()
        for line in _joined(text):
            if not line[:1].isspace() and (header := _HEADER.match(line)):
                body = program.computations.setdefault(header[2], {})
                if header[1]:
                    program.entry = header[2]
            elif match := _LINE.match(line):
                instruction = _instruction(match)
                body[instruction.name] = instruction
        return program

    def executed(
        self, *, loops: int = 1
    ) -> Iterator[tuple[Instruction, Computation, int, bool]]:
        """Instructions that run, where they stand, how often, and whether aside.

        What runs aside has a start and an end between which other work may lie. Of
        branches all are taken, so sums over them are upper bounds; of fusions the
        instructions inside are not listed.

        Args:
          loops: trips of loops whose count is not known: of the decode loop, rounds.
        """
        yield from self._within(self.entry, 1, loops, False)

    def _within(self, name: str, times: int, loops: int, aside: bool):
        body = self.computations.get(name, {})
        for each in body.values():
            if each.opcode == "while":
                trips = self._trips(each) or loops
                for callee in each.callees("body", "condition"):
                    yield from self._within(callee, times * trips, loops, aside)
            elif each.opcode == "conditional":
                for callee in each.callees(
                    "branch_computations", "true_computation", "false_computation"
                ):
                    yield from self._within(callee, times, loops, aside)
            elif each.opcode in _CALLS and (
                called := each.callees("to_apply", "calls", "called_computations")
            ):
                begun = aside or each.opcode.endswith("-start")
                for callee in called:
                    yield from self._within(callee, times, loops, begun)
            else:
                yield each, body, times, aside or each.opcode.endswith("-start")

    def _trips(self, loop: Instruction) -> int | None:
        """Of a loop that counts: as XLA says, or up to the constant it compares with.

        None where what ends it is computed.
        """
        if known := _TRIPS.search(loop.attributes):
            return int(known[1])
        [condition] = loop.callees("condition") or [""]
        body = self.computations.get(condition, {})
        root = next((each for each in body.values() if each.root), None)
        if root is None or root.opcode != "compare" or "LT" not in root.attributes:
            return None
        bound = body.get(root.operands[-1])
        if bound is None or not bound.arguments.isdecimal():
            return None
        return int(bound.arguments) if bound.opcode == "constant" else None

    def inside(self, fusion: Instruction) -> Computation:
        """What a fusion does; empty for other instructions."""
        called = fusion.callees("calls") if "fusion" in fusion.opcode else []
        return self.computations.get(called[0], {}) if called else {}


def _joined(text: str) -> Iterator[str]:
    """Lines of a program; what kernels say of themselves has line breaks of its own."""
    whole = ""
    for line in text.splitlines():
        if line.startswith(('"', "}}")):
            whole += line
        else:
            yield whole
            whole = line
    yield whole


def _instruction(match: re.Match) -> Instruction:
    root, name, result, opcode, rest = match.groups()
    depth, end = 1, 0
    while depth and end < len(rest):
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    arguments = rest[: end - 1]
    return Instruction(
        name=name,
        type=result,
        opcode=opcode,
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        arguments=arguments,
        attributes=rest[end:],
        root=bool(root),
    )
