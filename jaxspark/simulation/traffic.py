"""What a compiled program moves and computes, per chip: read from its text.

Memory: every instruction reads its operands and writes its result once, times the trips
of the loops around it. An operand of which only slices or rows are read counts as
these, an array that is changed in place as what is written, twice; ragged exchanges as
what may go and come, which is less than there is room for. Nothing knows of
caches in between, and a Pallas kernel counts its operands whole unless it says better.

Arithmetic: products, counted from their shapes (2 operations per multiply-add), and
what Pallas kernels say of themselves. XLA's own analysis counts loop bodies once.

Communication: bytes that leave a chip, for n chips in a group, by the ring algorithms:

    all-gather           (n - 1)/n of the result        all-to-all   (n - 1)/n of it
    reduce-scatter       (n - 1)/n of the operand       permute      all of it
    all-reduce         2 (n - 1)/n of it
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from jaxspark.simulation.hlo import Array, Computation, Instruction, Program

_FREE = {
    *("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast"),
    *("opt-barrier", "after-all", "add-dependency", "partition-id", "replica-id"),
    *("fusion-done", "async-update", "call-update", "custom-call-update"),
}
_PIECES = {"slice", "dynamic-slice", "gather"}
# Which operand of what writes in place holds what is written.
_WRITTEN = {"dynamic-update-slice": 1, "scatter": 2}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "ragged-all-to-all",
    "all-to-all",
    "collective-permute",
)


@dataclass(frozen=True)
class Collective:
    """A collective of a program.

    Attributes:
      kind: one of `COLLECTIVES`.
      array: the largest of its results.
      group: chips that take part together.
      times: it runs.
      asynchronous: whether other work may lie between its start and its end.
      origin: named scopes it was traced in.
    """

    kind: str
    array: Array
    group: int
    times: int
    asynchronous: bool
    origin: str

    @property
    def nbytes(self) -> float:
        """That leave a chip, each time it runs."""
        share, size = (self.group - 1) / max(self.group, 1), self.array.nbytes
        if self.kind == "reduce-scatter":
            return share * size * self.group
        if self.kind == "all-reduce":
            return 2 * share * size
        return size if self.kind == "collective-permute" else share * size


@dataclass
class Traffic:
    """Of one chip: bytes of its memory, operations, collectives."""

    memory: float = 0.0
    flops: float = 0.0
    collectives: list[Collective] = field(default_factory=list)

    def by_kind(self) -> dict[str, dict[str, float]]:
        """How often each kind of collective runs, and its bytes in all."""
        kinds: dict[str, dict[str, float]] = {}
        for each in self.collectives:
            entry = kinds.setdefault(each.kind, {"times": 0, "bytes": 0.0})
            entry["times"] += each.times
            entry["bytes"] += each.times * each.nbytes
        return kinds

    @property
    def sent(self) -> float:
        """Bytes that leave the chip in all."""
        return sum(each.times * each.nbytes for each in self.collectives)


@dataclass(frozen=True)
class LocalExperts:
    """What grouped products of one chip work on; their kernels state whole blocks.

    Attributes:
      count: experts of a layer on the chip, the only ones of all layers' it reads.
      share: of the rows that it is given those that are its own, if routing is even.
    """

    count: int
    share: float


def traffic(
    text: str, *, devices: int = 1, experts: LocalExperts | None = None
) -> Traffic:
    """Of a compiled program; loops of unknown length count as one trip.

    Args:
      text: `compiled.as_text()`.
      devices: chips it was compiled for.
      experts: of one chip; None for a model without.
    """
    program, found = Program.of(text), Traffic()
    for line, body, times, aside in program.executed():
        if kind := _collective(line, program):
            found.collectives.append(_describe(kind, line, times, devices, aside))
        moved = _moved(line, body, program)
        flops = _operations(line, body, program)
        if experts is not None and _is_grouped(line):
            moved -= _unread(line, body, experts.count)
            flops *= experts.share
        found.memory += times * moved
        found.flops += times * flops
    return found


def _is_grouped(line: Instruction) -> bool:
    """Whether it is a kernel for grouped products."""
    named = "grouped_matmul" in line.origin or "ragged_dot" in line.name
    return named and line.opcode == "custom-call"


def _collective(line: Instruction, program: Program) -> str | None:
    """Which kind of collective an instruction starts, alone or in a fusion."""
    name = line.opcode.removesuffix("-start")
    if name in COLLECTIVES:
        return name
    for inner in program.inside(line).values():
        if inner.opcode.removesuffix("-start") in COLLECTIVES:
            # TPUs fuse an all-reduce with the slice of it that a shard keeps.
            if inner.opcode == "all-reduce" and "scatter" in line.attributes:
                return "reduce-scatter"
            return inner.opcode.removesuffix("-start")
    return None


def _describe(
    kind: str, line: Instruction, times: int, devices: int, aside: bool
) -> Collective:
    group = devices
    if explicit := re.search(r"replica_groups=\{\{([\d,]*)\}", line.attributes):
        group = len(explicit[1].split(","))
    elif named := re.search(
        r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line.attributes
    ):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        # 'expert', or a part of it as 'expert':(2)8, of which 8 are a group.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        group = math.prod(int(part or sizes[name]) for name, part in axes)
    elif shaped := re.search(r"replica_groups=\[(\d+),(\d+)\]", line.attributes):
        group = int(shaped[2])
    arrays = line.arrays
    # What starts one carries its operands and its results.
    largest = max(arrays, key=lambda array: array.nbytes)
    if kind == "reduce-scatter" or kind == "ragged-all-to-all":
        # Rows go from and come to different rooms: at most what the smaller holds.
        rank = 2 if kind == "ragged-all-to-all" else 1
        real = [array for array in arrays if len(array.shape) >= rank]
        largest = min(real or arrays, key=lambda array: array.nbytes)
    return Collective(kind, largest, group, times, aside, line.origin)


def _size(arrays: Iterable[Array], *, anywhere: bool = False) -> float:
    return sum(a.nbytes for a in arrays if anywhere or a.in_main_memory)


def _moved(line: Instruction, body: Computation, program: Program) -> float:
    """Bytes of main memory that one instruction reads and writes."""
    operands = [body[name] for name in line.operands if name in body]
    if line.opcode in _FREE or line.opcode.endswith("-done"):
        return 0.0
    if inner := program.inside(line):
        return _moved_by_fusion(line, operands, inner, program)
    if "AllocateBuffer" in line.attributes:
        return 0.0
    if _collective(line, program) == "ragged-all-to-all":
        # On average as much goes as comes, at most what the smaller has room for.
        rooms = (_size(each.arrays, anywhere=True) for each in operands[:2])
        return 2 * min(rooms)
    if line.opcode in _PIECES:
        return 2 * _size(line.arrays, anywhere=True)
    if line.opcode in _WRITTEN:
        return 2 * _size(operands[_WRITTEN[line.opcode]].arrays, anywhere=True)
    if "cross_program_prefetch" in line.attributes:
        return 0.0  # made at the end of the run before, where it counts
    if line.opcode == "copy-start":
        return _size(operands[0].arrays) or _size(line.arrays[:1])
    if line.opcode == "slice-start":
        return _size(line.arrays[1:2], anywhere=True)
    # A kernel may read pieces of its operands: of one layer, what is chosen. It does
    # not know what of them the compiler keeps in vector memory.
    estimate = _estimate(line, "bytes_accessed")
    if estimate is not None and not _is_grouped(line):
        aside = _size(line.arrays, anywhere=True) - _size(line.arrays)
        for operand in operands:
            aside += _size(operand.arrays, anywhere=True) - _size(operand.arrays)
        return max(estimate - aside, 0.0)
    read = sum(_size(operand.arrays) for operand in operands)
    return read + _size(line.arrays)


def _unread(line: Instruction, body: Computation, experts: int) -> float:
    """Bytes of experts that a grouped product does not look at."""
    stacks = [
        array
        for name in line.operands
        if name in body
        for array in body[name].arrays
        if len(array.shape) == 3 and array.shape[0] > experts
    ]
    return sum(array.nbytes * (1 - experts / array.shape[0]) for array in stacks)


def _moved_by_fusion(
    line: Instruction,
    operands: list[Instruction],
    inner: Computation,
    program: Program,
) -> float:
    total = 0.0
    for place, operand in enumerate(operands):
        whole = _size(operand.arrays)
        readers = list(_readers(inner, _parameter(inner, place), program))
        if readers and all(at == 0 for _, at in readers):
            if all(reader.opcode in _PIECES for reader, _ in readers):
                parts = (_size(reader.arrays, anywhere=True) for reader, _ in readers)
                whole = min(whole, sum(parts))
            elif all(reader.opcode in _WRITTEN for reader, _ in readers):
                whole = 0.0
        total += whole
    [root] = [each for each in inner.values() if each.root] or [line]
    return total + min(_written(root, inner), _size(line.arrays))


def _parameter(body: Computation, place: int) -> str:
    names = (
        each.name
        for each in body.values()
        if each.opcode == "parameter" and each.arguments == str(place)
    )
    return next(names, "")


def _readers(body: Computation, name: str, program: Program):
    """What reads a value and as which operand, behind bitcasts and inner fusions.

    A fusion whose result lies where its operand does only changes how it is tiled.
    """
    for each in body.values():
        for place, operand in enumerate(each.operands):
            if operand != name:
                continue
            aliased = "output_to_operand_aliasing" in each.attributes
            if each.opcode == "bitcast" or aliased:
                yield from _readers(body, each.name, program)
            elif inner := program.inside(each):
                yield from _readers(inner, _parameter(inner, place), program)
            else:
                yield each, place


def _written(root: Instruction, body: Computation) -> float:
    """Bytes that a fusion's result costs."""
    operands = [body[name] for name in root.operands if name in body]
    if root.opcode == "tuple":
        return sum(_written(operand, body) for operand in operands)
    if root.opcode == "bitcast" and operands:
        return _written(operands[0], body)
    if root.opcode in _WRITTEN:
        return 2 * _size(operands[_WRITTEN[root.opcode]].arrays, anywhere=True)
    return _size(root.arrays)


def _estimate(line: Instruction, what: str) -> float | None:
    """What a kernel says of itself, "flops" or "bytes_accessed"."""
    quote = r'(?:"|\\22)'  # GPUs' estimates are a text in a text
    said = re.search(rf"{quote}{what}{quote}:\s*{quote}?(\d+)", line.attributes)
    return float(said[1]) if said and line.opcode == "custom-call" else None


def _operations(line: Instruction, body: Computation, program: Program) -> float:
    """Of its products, or as a kernel says of itself."""
    if inner := program.inside(line):
        return sum(_operations(each, inner, program) for each in inner.values())
    if line.opcode == "custom-call":
        return _estimate(line, "flops") or 0.0
    if line.opcode not in ("dot", "convolution"):
        return 0.0
    out = math.prod(line.arrays[0].shape)
    if line.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.attributes)
        left = body[line.operands[0]].arrays[0].shape if line.operands else ()
        contracted = [left[int(n)] for n in (axes[1] if axes else "").split(",") if n]
        return 2.0 * out * math.prod(contracted)
    kernel = body[line.operands[1]].arrays[0].shape if len(line.operands) > 1 else ()
    labels = re.search(r"dim_labels=\w+_(\w+)->", line.attributes)
    if not labels or not kernel:
        return 0.0
    summed = _summed_windows(line.attributes)
    per_output = math.prod(
        n
        for n, at in zip(kernel, labels[1])
        if at == "i" or (at.isdecimal() and int(at) in summed)
    )
    return 2.0 * out * per_output


def _summed_windows(attributes: str) -> set[int]:
    """Dimensions that a convolution's window sums over.

    TPUs write products as convolutions: an axis of a batch is a window that is dilated
    to meet each element once, an axis of the right side alone one that is padded.
    """
    window = re.search(r"window=\{(.*?)\}", attributes)
    said = dict(each.split("=") for each in window[1].split()) if window else {}
    dilated = said.get("lhs_dilate", "").split("x")
    padded = said.get("pad", "").split("x")
    return {
        index
        for index, _ in enumerate(said.get("size", "").split("x"))
        if dilated[index : index + 1] in ([], [""], ["1"])
        and padded[index : index + 1] in ([], [""], ["0_0"])
    }
