"""Grouped products on TPUs, with weights read once and as wide as they are stored.

When decoding, nearly every expert is hit by a few rows, so the time is that of reading
all experts' weights. The grid goes over parts of the outputs and, inside, over tiles of
rows (`visits`): as many as there are, so that a group without rows is never fetched.
While one part of a group's matrix is multiplied the next one is on its way, in pieces
of megabytes. A TPU of two cores gives each half of the outputs.

Matrices are plain, or in blocks of FP8 or FP4 that lie as `transposed` says.
tokamax's kernel takes plain ones in tiles of 128 x 128, which are too small to fill
memory, and none with a scale for 32 rows on both ways.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sizes import block_sizes, shape
from pallas_kernels.grouped_matmul import mosaic_tpu_kernel, ref
from pallas_kernels.grouped_matmul.mosaic_tpu_kernel import LANES, SUBLANES
from pallas_kernels.grouped_matmul.visits import Visits
from pallas_kernels.precision import narrow
from pallas_kernels.quantized import Quantized
from pallas_kernels.transposed import Transposed

_VMEM = 48 << 20
# Of one piece of weights, and where no smaller one can be; two are there at a time.
_PIECE, _LARGEST_PIECE = 4 << 20, 8 << 20
_WIDTHS = (2048, 1024, 512, 256, 128)
# Most outputs of a step.
_MOST_OUTPUTS = 1024
# More rows than this occupy the matrix units longer than memory.
_MOST_ROWS = 64


def supports(x_AI, w_GOI, group_sizes_E, group_offset) -> str | None:
    """Why the kernel cannot multiply these; None if it can."""
    if isinstance(w_GOI, Quantized) and not isinstance(w_GOI, Transposed):
        return "reads matrices in blocks as `pallas_kernels.transposed` turns them over"
    if x_AI.dtype not in (jnp.float32, jnp.bfloat16) or w_GOI.dtype != x_AI.dtype:
        return (
            "multiplies float32 or bfloat16 of one type, not "
            f"{x_AI.dtype} with {w_GOI.dtype}"
        )
    if any(size % LANES for size in w_GOI.shape[1:]) or not len(x_AI):
        return (
            f"needs rows, and matrices in multiples of {LANES}, got {len(x_AI)} rows "
            f"and {w_GOI.shape[1:]}"
        )
    if any(_width(w_GOI, axis) is None for axis in (1, 2)):
        most = _LARGEST_PIECE >> 20
        return f"fetches {most} MB at a time, too little of {w_GOI.shape[1:]}"
    return None


@jax.custom_vjp
def grouped_matmul_mosaic_tpu(
    x_AI: Float[Array, "A I"],
    w_GOI: Float[Array, "G O I"] | Transposed,
    group_sizes_E: Int[Array, " E"],
    group_offset: Int[Array, ""],
) -> Float[Array, "A O"]:
    """See `api.grouped_matmul`; gradients of matrices are those of XLA's loop."""
    return _product(x_AI, w_GOI, group_sizes_E, group_offset, 2)


def _saving(*operands):
    return grouped_matmul_mosaic_tpu(*operands), operands


def _backward(operands, dy_AO):
    x_AI, w_GOI, group_sizes_E, group_offset = operands
    dx_AI = _product(dy_AO, w_GOI, group_sizes_E, group_offset, 1)
    dw_GOI = None
    if not isinstance(w_GOI, Quantized):
        dw_GOI = ref.weight_gradient(*operands, dy_AO)
    return dx_AI, dw_GOI, None, None


grouped_matmul_mosaic_tpu.defvjp(_saving, _backward)


def _product(x_AC, w_GOI, group_sizes_E, group_offset, over: int):
    """Rows times their matrices, summed over axis 1 (O) or 2 (I) of these."""
    with jax.enable_x64(False):
        sizes_E, offset = narrow((group_sizes_E, group_offset))
        mean = -(-len(x_AC) // len(sizes_E))
        most, outputs = _sizes(w_GOI, mean, over)
        tile = _tile(x_AC, w_GOI, mean, over, most)
        visits = Visits.of(len(x_AC), sizes_E, tile)
        groups_V = visits.groups_V + offset
        x_PC, hit = visits.tiled(x_AC), (len(x_AC), len(sizes_E))
        y_PB = _call(x_PC, w_GOI, groups_V, visits.count, tile, over, outputs, *hit)
        return visits.flat(y_PB).astype(x_AC.dtype)


def _sizes(w_GOI, mean: int, over: int) -> tuple[int, ...]:
    """Most rows of a tile, and most outputs of a step."""
    kind = str(w_GOI.dtype)
    if isinstance(w_GOI, Transposed):
        kind = "fp4" if w_GOI.packed else "fp8"
    if over == 1:
        kind = f"gradients {kind}"
    summed, outputs = w_GOI.shape[over], w_GOI.shape[3 - over]
    of = shape(kind, rows=mean, summed=summed, outputs=outputs)
    most = {"rows": _MOST_ROWS, "outputs": _MOST_OUTPUTS}
    return block_sizes("grouped_matmul", of, **most)


def _tile(x_AC, w_GOI, mean: int, over: int, most: int) -> int:
    """Rows per tile: about what a group has, a power of two."""
    # Blocks of eight rows are scaled after the product, see `mosaic_tpu_kernel`.
    few = isinstance(w_GOI, Transposed) and over == 2
    least = SUBLANES if few or x_AC.dtype == jnp.float32 else 2 * SUBLANES
    return min(most, max(least, 1 << (mean - 1).bit_length()))


def _width(w_GOI, over: int, outputs: int = _MOST_OUTPUTS) -> int | None:
    """Outputs of a step: parts of some megabytes, evenly many if possible."""
    size, summed = w_GOI.shape[3 - over], w_GOI.shape[over]
    widths = [width for width in _WIDTHS if width <= outputs]
    if isinstance(w_GOI, Transposed):
        bits = 4 if w_GOI.packed else 8
        if over == 1:  # Scales come in parts of eight rows, or whole.
            widths = [w for w in widths if w % (SUBLANES * w_GOI.block) == 0] + [size]
    else:
        bits = 8 * w_GOI.dtype.itemsize
    whole = [w for w in widths if size % w == 0]
    for most in (_PIECE, _LARGEST_PIECE):
        fitting = [w for w in whole if summed * w * bits <= 8 * most]
        even = [w for w in fitting if size // w % 2 == 0]
        if fitting:
            return (even or fitting)[0]
    return None


def _call(
    x_PC,
    w_GOI,
    groups_V,
    count,
    tile: int,
    over: int,
    outputs: int,
    rows: int,
    groups: int,
):
    """Tiles of rows times the matrices of their groups.

    Costs are told for `rows` that hit as many of `groups` as they can.
    """
    size, summed = w_GOI.shape[3 - over], w_GOI.shape[over]
    width = _width(w_GOI, over, outputs)
    assert width is not None
    in_specs = [pl.BlockSpec((tile, summed), lambda n, v, groups_V: (v, 0))]
    scratch, out_dtype = [], x_PC.dtype
    if isinstance(w_GOI, Transposed):
        leaves = [w_GOI.elements, w_GOI.scales]
        kernel = functools.partial(mosaic_tpu_kernel.multiply_blocks, axis=2 - over)
        cut = 2 if over == 2 else 1
        blocks, columns = _part(w_GOI.scales, cut, size, width)
        at_once = _at_once(columns, blocks * w_GOI.block)
        shape = (columns // at_once, blocks, at_once)
        scratch.append(pltpu.VMEM(shape, jnp.float32))
        if over == 2 and tile == SUBLANES and x_PC.dtype == jnp.bfloat16:
            out_dtype = jnp.float32
            rows = tile * mosaic_tpu_kernel.CHUNK // w_GOI.block
            scratch.append(pltpu.VMEM((rows, summed), x_PC.dtype))
    else:
        leaves, cut = [w_GOI], 3 - over
        kernel = functools.partial(mosaic_tpu_kernel.multiply, axis=over - 1)
    for leaf in leaves:

        def place(n, v, groups_V):
            return group_of(groups_V, v), *((n, 0) if cut == 1 else (0, n))

        in_specs.append(pl.BlockSpec((1, *_part(leaf, cut, size, width)), place))
    read = min(rows, groups) * sum(
        leaf[0].size * leaf.dtype.itemsize for leaf in leaves
    )
    moved = x_PC.size * (size // width) * x_PC.dtype.itemsize
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((len(x_PC), size), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(size // width, count),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((tile, width), lambda n, v, groups_V: (v, n)),
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * size * summed,
            bytes_accessed=read + moved + len(x_PC) * size * 4,
            transcendentals=0,
        ),
        name="grouped_matmul",
    )(groups_V, x_PC, *leaves)


def group_of(groups_V, visit):
    """Group of a tile."""
    return groups_V[visit]


def _at_once(columns: int, rows: int) -> int:
    """Columns of which weights are made at once."""
    most = max(LANES, mosaic_tpu_kernel.MOST_AT_ONCE // rows)
    widths = mosaic_tpu_kernel.AT_ONCE
    return next(w for w in widths if columns % w == 0 and w <= most)


def _part(leaf, cut: int, size: int, width: int) -> tuple[int, int]:
    """Shape of a leaf's part: `width` of the `size` outputs along axis `cut`."""
    rows, columns = leaf.shape[1:]
    if cut == 1:
        return rows * width // size, columns
    return rows, columns * width // size
