"""Sizes of kernels' blocks: a small table per chip, over what a kernel says by itself.

A kernel names its sizes with defaults that are sane everywhere:

    of = shape(dtype, T=192, D=4096)
    rows, tokens = block_sizes("verify", of, rows=512, tokens=512)

`tuned/CHIP.json` may know better for some shapes, by op and by a coarse shape whose
numbers are rounded up to powers of two: `jaxspark tune_kernels` makes such files, and
each entry says what it was measured by. The chip is the one that is lowered for.
"""

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import expected_kind

# A folder of tables that are read instead of those that come with the package.
ENVIRONMENT = "PALLAS_KERNELS_TUNED"
PACKAGED = Path(__file__).parent / "tuned"
_CHIPS = {
    "v5e": r"TPU v5( lite|e)",
    "v5p": r"TPU v5p?",
    "v6e": r"TPU v6( lite|e)",
    "tpu7x": r"TPU ?v?7x?",
    "h100": r".*\bG?H(100|200|800)\b.*",
}

type Sizes = dict[str, int]


@dataclass
class Trial:
    """Sizes that are tried instead, and what kernels asked for meanwhile.

    Attributes:
      sizes: by op and name; those that are not there are the kernels' own.
      asked: by op and shape, what the kernel got.
    """

    sizes: Mapping[str, Sizes]
    asked: dict[tuple[str, str], Sizes] = field(default_factory=dict)


_trials: list[Trial] = []


def shape(kind: str | jnp.dtype, **numbers: int) -> str:
    """A coarse shape: "bfloat16 T=256 D=4096" of T=192 and D=4096.

    Args:
      kind: of the operands: a type, or a word.
      **numbers: sizes that matter.
    """
    coarse = (
        f"{name}={1 << max(n - 1, 0).bit_length()}" for name, n in numbers.items()
    )
    return " ".join([kind if isinstance(kind, str) else jnp.dtype(kind).name, *coarse])


def block_sizes(op: str, of: str, **defaults: int) -> tuple[int, ...]:
    """Sizes of an op's blocks, in the order of its defaults.

    Args:
      op: by which tables name it.
      of: its coarse `shape`.
      **defaults: sizes where no table says others.

    Raises:
      ValueError: the chip's table is malformed; names the file and the entry.
    """
    if _trials:
        trial = _trials[-1]
        sizes = defaults | _known(trial.sizes.get(op, {}), defaults, f"trial of {op}")
        trial.asked[op, of] = sizes
        return tuple(sizes.values())
    chip = chip_of(expected_kind())
    if chip is None:
        return tuple(defaults.values())
    path = Path(os.environ.get(ENVIRONMENT, PACKAGED)) / f"{chip}.json"
    tuned = table(path).get(op, {}).get(of, {})
    return tuple((defaults | _known(tuned, defaults, f"{path}: {op}: {of}")).values())


@contextlib.contextmanager
def trying(sizes: Mapping[str, Sizes] | None = None) -> Iterator[Trial]:
    """Within it kernels that are traced take these sizes, and no table's.

    JAX keeps programs that it traced before; they must be new, or forgotten.
    """
    trial = Trial(sizes or {})
    _trials.append(trial)
    try:
        yield trial
    finally:
        _trials.pop()


def chip_of(kind: str) -> str | None:
    """The name of a chip's table, by how a device calls itself; None if it has none."""
    return next((c for c, says in _CHIPS.items() if re.fullmatch(says, kind)), None)


@functools.cache
def table(path: Path) -> dict[str, dict[str, Sizes]]:
    """Sizes by op and shape; nothing where there is no file.

    Raises:
      ValueError: it is malformed.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return {}
    try:
        ops = json.loads(text)["ops"]
        found = {
            op: {of: dict(entry["sizes"]) for of, entry in shapes.items()}
            for op, shapes in ops.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: is no table of block sizes, "
            '{"ops": {OP: {SHAPE: {"sizes": {NAME: SIZE}}}}}: '
            f"{error!r}; remove it, or make it by jaxspark tune_kernels"
        ) from error
    return found


def _known(sizes: Sizes, defaults: Sizes, where: str) -> Sizes:
    """The sizes, if they are some of those that a kernel has."""
    for name, size in sizes.items():
        if name not in defaults:
            raise ValueError(f"{where}: has {name!r}, expected {', '.join(defaults)}")
        if type(size) is not int or size < 1 or np.bitwise_count(size) != 1:
            raise ValueError(f"{where}: {name} is {size!r}, expected a power of two")
    return sizes
