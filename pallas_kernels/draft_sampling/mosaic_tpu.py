"""DSpark's sequential head on TPUs: one step of it, by one pass over the vocabulary.

Moved: the step's base logits, W2, a few numbers per slot and lane; corrected logits
stay in the vector memory. Computed: the bias of a tile of tokens by the matrix units,
then its draws (`draws`), of which the noise is most.

A step must know the token before, so nothing of several steps can be shared but W2,
which is larger than what a core holds.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import draws_mosaic_tpu as drawing
from pallas_kernels.block_sizes import block_sizes, shape
from pallas_kernels.draws import Draws, Rows
from pallas_kernels.precision import in_32_bits
from pallas_kernels.ragged import LANES
from pallas_kernels.verify.ref import products

TOKENS = 2048
_MOST_LOGITS = 1 << 19  # of a tile


def supports(base_GBW, row, latent_BR, weight_WR, rows, first, ids_W) -> str | None:
    """Why the kernel cannot draw from these; None if it can."""
    if base_GBW.dtype != jnp.float32:
        return f"takes base logits in float32, not {base_GBW.dtype}"
    if latent_BR.dtype not in (jnp.float32, jnp.bfloat16):
        return f"multiplies float32 or bfloat16, not {latent_BR.dtype}"
    if weight_WR.dtype != latent_BR.dtype:
        return f"needs one type, not {latent_BR.dtype} and W2 in {weight_WR.dtype}"
    if len(latent_BR) * LANES > _MOST_LOGITS:
        return f"holds up to {_MOST_LOGITS // LANES} slots, not {len(latent_BR)}"
    return None


@in_32_bits
def draft_sampling_mosaic_tpu(
    base_GBW: Float[Array, "G B W"],
    row: Int[Array, ""],
    latent_BR: Float[Array, "B R"],
    weight_WR: Float[Array, "W R"],
    rows: Rows,
    first: Int[Array, ""],
    ids_W: Int[Array, " W"] | None,
) -> Draws:
    """See `api.draft_sampling`."""
    B, R = latent_BR.shape
    padded = pl.cdiv(B, drawing.SIXTEEN) * drawing.SIXTEEN
    rank = pl.cdiv(R, LANES) * LANES
    latent_BR = jnp.pad(latent_BR, ((0, padded - B), (0, rank - R)))
    weight_WR = jnp.pad(weight_WR, ((0, 0), (0, rank - R)))
    columns = drawing.columns(rows, None, padded)
    scalars, noisy = jnp.stack([row, first]), rows.keys_R2 is not None
    drawn = pass_over(
        base_GBW, latent_BR, weight_WR, columns, ids_W, scalars, noisy=noisy
    )
    return drawing.finished(drawn, rows, certainty=True)


def pass_over(base_GBW, latent_BR, weight_WR, columns, ids_W, scalars, *, noisy: bool):
    """Draws of each lane and core; see `draws_mosaic_tpu`.

    Slots and ranks are padded, but not those of the base logits.
    """
    (padded, rank), (_, B, W) = latent_BR.shape, base_GBW.shape
    size = shape(latent_BR.dtype, B=padded, R=rank)
    [width] = block_sizes("draft_sampling", size, tokens=TOKENS)
    while width > LANES and width * padded > _MOST_LOGITS:
        width //= 2
    tiles = pl.cdiv(W, width)
    per = pl.cdiv(tiles, drawing.CORES)

    def of(c, v):
        return jnp.minimum(c * per + v, tiles - 1)

    def whole(*shape):
        return pl.BlockSpec(shape, lambda c, v, scalars: (0,) * len(shape))

    in_specs = [
        pl.BlockSpec((1, B, width), lambda c, v, scalars: (scalars[0], 0, of(c, v))),
        whole(padded, rank),
        pl.BlockSpec((width, rank), lambda c, v, scalars: (of(c, v), 0)),
        whole(2, padded, LANES),
        whole(3, padded, LANES),
    ]
    operands = [base_GBW, latent_BR, weight_WR, *columns]
    if ids_W is not None:
        in_specs.append(pl.BlockSpec((1, width), lambda c, v, scalars: (0, of(c, v))))
        operands.append(ids_W[None])
    return pl.pallas_call(
        functools.partial(_step, per=per, count=W, noisy=noisy),
        out_shape=drawing.outputs(padded, certainty=True),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(drawing.CORES, per),
            in_specs=in_specs,
            out_specs=drawing.output_blocks(
                padded, lambda c, v, scalars: 0, certainty=True
            ),
            scratch_shapes=[pltpu.VMEM((padded, width), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=drawing.VMEM,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * padded * W * rank,
            bytes_accessed=4 * B * W + W * rank * weight_WR.dtype.itemsize,
            transcendentals=(3 + 2 * noisy) * padded * W,
        ),
        name="draft_sampling",
    )(scalars, *operands)


def _step(
    scalars_ref,
    base_ref,
    latent_ref,
    weight_ref,
    floats_ref,
    integers_ref,
    *refs,
    per: int,
    count: int,
    noisy: bool,
):
    """A tile of tokens."""
    *ids, place_ref, others_ref, z_ref = refs
    v, slots = pl.program_id(1), base_ref.shape[1]
    pl.when(v == 0)(lambda: drawing.begin(place_ref, others_ref, certainty=True))
    z_ref[...] = products(latent_ref[...], weight_ref[...])
    z_ref[:slots] += base_ref[0]
    start = (pl.program_id(0) * per + v) * z_ref.shape[1]
    tile = drawing.Tile(start, count, scalars_ref[1], ids[0] if ids else None)

    def eight(r, _):
        columns, outputs = (floats_ref, integers_ref), (place_ref, others_ref)
        drawing.extend(r, z_ref, tile, columns, outputs, certainty=True, noisy=noisy)
        return _

    jax.lax.fori_loop(0, z_ref.shape[0] // drawing.SUBLANES, eight, 0)
