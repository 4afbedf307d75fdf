"""Grouped products in XLA: a loop over tiles of rows, each of one group.

A tile is a few consecutive rows of one group, so the loop runs about
sum_g ceil(size_g / tile) times: its cost follows the rows, not the groups (a masked
product over all groups, which XLA makes of `lax.ragged_dot`, costs groups x rows).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.precision import accum_dtype, precision
from pallas_kernels.quantized import Quantized, dense


@jax.custom_vjp
def grouped_matmul_xla(
    x_AI: Float[Array, "A I"],
    w_GOI: Float[Array, "G O I"] | Quantized,
    group_sizes_E: Int[Array, " E"],
    group_offset: Int[Array, ""],
) -> Float[Array, "A O"]:
    """See `api.grouped_matmul`."""
    return _rows(x_AI, w_GOI, group_sizes_E, group_offset, "OI,tI->tO")


def _rows(x_AI, w_GOI, group_sizes_E, group_offset, equation):
    """Every row times its group's matrix, or, by `equation`, its transpose."""
    rows, tile = x_AI.shape[0], _tile(x_AI, group_sizes_E)
    width = w_GOI.shape[1 if equation.endswith("O") else 2]

    def body(index, y_AO):
        group, start, end = _find(index, group_sizes_E, tile)
        x_tI = jax.lax.dynamic_slice_in_dim(padded_AI, start, tile)
        w_OI = dense(jax.tree.map(partial(_pick, group_offset + group), w_GOI))
        y_tO = _einsum(equation, w_OI, x_tI).astype(x_AI.dtype)
        # Rows past the group's end are zeros until their own group's tile comes.
        y_tO = jnp.where((start + jnp.arange(tile) < end)[:, None], y_tO, 0)
        return jax.lax.dynamic_update_slice_in_dim(y_AO, y_tO, start, 0)

    padded_AI = jnp.pad(x_AI, ((0, tile), (0, 0)))
    y_AO = jnp.zeros((rows + tile, width), x_AI.dtype)
    return jax.lax.fori_loop(0, _tiles(group_sizes_E, tile)[-1], body, y_AO)[:rows]


def _forward(x_AI, w_GOI, group_sizes_E, group_offset):
    y_AO = grouped_matmul_xla(x_AI, w_GOI, group_sizes_E, group_offset)
    return y_AO, (x_AI, w_GOI, group_sizes_E, group_offset)


def _backward(operands, dy_AO):
    x_AI, w_GOI, group_sizes_E, group_offset = operands
    dx_AI = _rows(dy_AO, w_GOI, group_sizes_E, group_offset, "OI,tO->tI")
    dw_GOI = None
    if not isinstance(w_GOI, Quantized):
        dw_GOI = weight_gradient(*operands, dy_AO)
    return dx_AI, dw_GOI, None, None


def weight_gradient(
    x_AI, w_GOI, group_sizes_E, group_offset, dy_AO
) -> Float[Array, "G O I"]:
    """The gradient of matrices."""
    tile = _tile(x_AI, group_sizes_E)
    x_padded, dy_padded = (jnp.pad(r, ((0, tile), (0, 0))) for r in (x_AI, dy_AO))

    def body(index, dw_GOI):
        group, start, end = _find(index, group_sizes_E, tile)
        there_t1 = (start + jnp.arange(tile) < end)[:, None]
        # Both: what others' rows hold need not be finite.
        x_tI, dy_tO = (
            jnp.where(there_t1, jax.lax.dynamic_slice_in_dim(r, start, tile), 0)
            for r in (x_padded, dy_padded)
        )
        return dw_GOI.at[group_offset + group].add(_einsum("tO,tI->OI", dy_tO, x_tI))

    # A sum in bfloat16 would stop growing after some hundred tiles.
    dw_GOI = jnp.zeros(w_GOI.shape, accum_dtype(w_GOI.dtype))
    dw_GOI = jax.lax.fori_loop(0, _tiles(group_sizes_E, tile)[-1], body, dw_GOI)
    return dw_GOI.astype(w_GOI.dtype)


grouped_matmul_xla.defvjp(_forward, _backward)


def _pick(group, leaf_GX):
    return jax.lax.dynamic_index_in_dim(leaf_GX, group, keepdims=False)


def _tile(x_AI, group_sizes_E) -> int:
    """Rows per tile: about what a group has, a power of two within 8..128."""
    mean = -(-x_AI.shape[0] // group_sizes_E.shape[0])
    return min(128, max(8, 1 << (mean - 1).bit_length()))


def _tiles(group_sizes_E, tile):
    """Tiles up to and including each group."""
    return jnp.cumsum(-(-group_sizes_E // tile))


def _find(index, group_sizes_E, tile):
    """Group of a tile, its first row and the end of the group's rows."""
    ends_E, tiles_E = jnp.cumsum(group_sizes_E), _tiles(group_sizes_E, tile)
    group = jnp.searchsorted(tiles_E, index, side="right", method="compare_all")
    before = tiles_E[group] - -(-group_sizes_E[group] // tile)
    start = ends_E[group] - group_sizes_E[group] + (index - before) * tile
    return group, start, ends_E[group]


def _einsum(equation, *operands):
    dtype = operands[0].dtype
    return jnp.einsum(
        equation,
        *operands,
        precision=precision(dtype),
        preferred_element_type=accum_dtype(dtype),
    )
