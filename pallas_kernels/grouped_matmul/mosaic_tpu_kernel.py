"""The kernels of `mosaic_tpu`: a step multiplies a tile of rows with part of a matrix.

Moved: some outputs' weights, whole along what is summed over, as wide as they are
stored; they stay for all tiles of their group. A tile of rows; what it makes.

Computed, plain matrices: one product. Matrices in blocks: elements are widened on the
vector units (two operations for eight FP4, then one for four of either type, and one
to make bfloat16 of them), 128 rows of them at a time, which the matrix units take.

Scales: tiles of eight rows multiply with elements that are not scaled yet, each block
of 32 by itself: copies of the rows, zero outside of their block, are the rows of the
same product, and the matrix units have time for 32 rows while the weights' next 128
are made. Then four numbers are scaled for 128 weights. Larger tiles multiply with
scaled weights, the gradients of rows too.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.precision import product
from pallas_kernels.transposed import CHUNK, FP8, factors, halves

LANES = 128
# Columns of which weights are made in straight code, where the matrix units never
# drain, and how many weights at most.
AT_ONCE, MOST_AT_ONCE = (1024, 512, 256, 128), 1 << 22
SUBLANES = 8
# JAX's simulator of TPU memory knows no strides of 0; tests there go without.
BROADCAST_LOADS = True


def multiply(groups_ref, x_ref, w_ref, y_ref, *, axis: int):
    """A step with plain weights, summed over their `axis`."""
    y_ref[...] = product(x_ref[...], w_ref[0], (1, axis)).astype(y_ref.dtype)


def multiply_blocks(
    groups_ref, x_ref, w_ref, s_ref, y_ref, factors_ref, *blocks, axis: int
):
    """A step with weights in blocks, [I, O] of which `axis` is summed over."""
    packed = w_ref.dtype == jnp.uint8
    inputs = (2 if packed else 1) * w_ref.shape[1]
    block = inputs // s_ref.shape[1]
    per = CHUNK // block
    dtype = x_ref.dtype
    parts, _, width = factors_ref.shape
    for part in range(parts):
        at = slice(part * width, (part + 1) * width)
        factors_ref[part] = factors(s_ref[0, :, at], packed)

    def row(index, part, rows):
        """A row of factors, as many times as asked."""
        if not BROADCAST_LOADS:
            return jnp.broadcast_to(factors_ref[part, pl.ds(index, 1)], (rows, width))
        eight = factors_ref[part, pl.ds(index, SUBLANES, stride=0)]
        return jnp.concatenate([eight] * (rows // SUBLANES))

    def elements(chunk, part):
        """128 rows of weights, in float32, in pieces of a block each at most."""
        at = columns(part)
        if not packed:
            w = w_ref[0, pl.ds(chunk * CHUNK, CHUNK), at]
            return [w.astype(jnp.float32)]
        half = CHUNK // 2
        pair = halves(pltpu.bitcast(w_ref[0, pl.ds(chunk * half, half), at], jnp.int32))
        widened = [pltpu.bitcast(x, FP8).astype(jnp.float32) for x in pair]
        return [x[i : i + block] for x in widened for i in range(0, half, block)]

    def scaled(chunk, part):
        pieces = [
            piece * row(chunk * per + n, part, block)
            for n, piece in enumerate(elements(chunk, part))
        ]
        w = jnp.concatenate(pieces).astype(jnp.bfloat16)
        return w.astype(dtype)

    def columns(part):
        return pl.ds(pl.multiple_of(part * width, width), width)

    def rows_of(chunk):
        return pl.ds(chunk * CHUNK, CHUNK)

    chunks, tile = inputs // CHUNK, x_ref.shape[0]
    if axis == 1:
        for chunk in range(chunks):
            y = jnp.zeros((tile, CHUNK), jnp.float32)
            for part in range(parts):
                y += product(x_ref[:, columns(part)], scaled(chunk, part), (1, 1))
            y_ref[:, rows_of(chunk)] = y.astype(y_ref.dtype)
        return

    if blocks:
        [blocks_ref] = blocks
        x = x_ref[...].astype(jnp.float32)
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        mine = [(lane & CHUNK - 1) // block == n for n in range(per)]
        copies = jnp.concatenate([jnp.where(each, x, 0) for each in mine])
        blocks_ref[...] = copies.astype(dtype)

    def outputs(part, _):
        y = jnp.zeros((tile, width), jnp.float32)
        for chunk in range(chunks):
            if not blocks:
                y += product(x_ref[:, rows_of(chunk)], scaled(chunk, part), (1, 0))
                continue
            w = jnp.concatenate(elements(chunk, part)).astype(dtype)
            sums = product(blocks_ref[:, rows_of(chunk)], w, (1, 0))
            for n in range(per):
                of_block = sums[n * tile : (n + 1) * tile]
                y += of_block * row(chunk * per + n, part, tile)
        y_ref[:, columns(part)] = y.astype(y_ref.dtype)
        return _

    jax.lax.fori_loop(0, parts, outputs, 0)
