"""Verification on TPUs: the head is read once, and no logits leave the vector memory.

Moved: hidden states (once for 512 rows), the head (once for as many), a few numbers per
row and lane. Computed: a tile of logits by the matrix units, and meanwhile draws of the
tile before (`draws_mosaic_tpu`), some rows for each part of the sums that logits are.
Verifying is bound by the matrix units from about 170 rows on (v5p); noise is as much
work for the vector units as the product of 100 rows of width 4,096 for the others.

XLA writes logits of four bytes and reads them five times: as much as the head itself
for some 200 rows, several times that for a batch.
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

# Most rows and tokens of a step.
ROWS, TOKENS = 512, 512
_HEAD_TILE = 8 << 20
# Of a product's sums, that are added while some rows are drawn.
_CHUNKS = (1024, 512, 256, 128)


def supports(hidden_TD, head_VD, rows, named_T, first) -> str | None:
    """Why the kernel cannot verify these; None if it can."""
    if hidden_TD.dtype not in (jnp.float32, jnp.bfloat16):
        return f"multiplies float32 or bfloat16, not {hidden_TD.dtype}"
    if head_VD.dtype != hidden_TD.dtype:
        return f"needs one type, not {hidden_TD.dtype} and a head in {head_VD.dtype}"
    if hidden_TD.shape[1] % LANES or not len(hidden_TD):
        return f"needs rows, of a width in multiples of {LANES}: {hidden_TD.shape}"
    return None


@in_32_bits
def verify_mosaic_tpu(
    hidden_TD: Float[Array, "T D"],
    head_VD: Float[Array, "V D"],
    rows: Rows,
    named_T: Int[Array, " T"] | None,
    first: Int[Array, ""],
) -> Draws:
    """See `api.verify`."""
    T, D = hidden_TD.shape
    of = shape(hidden_TD.dtype, T=T, D=D)
    most, tokens = block_sizes("verify", of, rows=ROWS, tokens=TOKENS)
    steps = pl.cdiv(T, most)
    tile = pl.cdiv(pl.cdiv(T, steps), drawing.SIXTEEN) * drawing.SIXTEEN
    padded = steps * tile
    hidden_TD = jnp.pad(hidden_TD, ((0, padded - T), (0, 0)))
    columns = drawing.columns(rows, named_T, padded)
    noisy = rows.keys_R2 is not None
    sizes = {"tile": tile, "tokens": tokens}
    drawn = pass_over(hidden_TD, head_VD, columns, first, **sizes, noisy=noisy)
    return drawing.finished(drawn, rows, certainty=False)


def pass_over(
    hidden_TD, head_VD, columns, first, *, tile: int, tokens: int, noisy: bool
):
    """Draws of each lane and core, of whole tiles of rows; see `draws_mosaic_tpu`."""
    (T, D), V = hidden_TD.shape, len(head_VD)
    steps, width = T // tile, tokens
    while width > LANES and width * D * head_VD.dtype.itemsize > _HEAD_TILE:
        width //= 2
    tiles = pl.cdiv(V, width)
    per = pl.cdiv(tiles, drawing.CORES)

    def of_rows(count):
        return pl.BlockSpec((count, tile, LANES), lambda c, t, v, first: (0, t, 0))

    def head_tile(c, t, v, first):
        return jnp.minimum(c * per + jnp.minimum(v, per - 1), tiles - 1), 0

    return pl.pallas_call(
        functools.partial(_step, per=per, count=V, noisy=noisy),
        out_shape=drawing.outputs(T, certainty=False),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(drawing.CORES, steps, per + 1),
            in_specs=[
                pl.BlockSpec((tile, D), lambda c, t, v, first: (t, 0)),
                pl.BlockSpec((width, D), head_tile),
                of_rows(2),
                of_rows(3),
            ],
            out_specs=drawing.output_blocks(
                tile, lambda c, t, v, first: t, certainty=False
            ),
            scratch_shapes=[pltpu.VMEM((tile, width), jnp.float32)] * 2,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=drawing.VMEM,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * T * V * D,
            bytes_accessed=(steps * V + T) * D * head_VD.dtype.itemsize,
            transcendentals=(2 + 2 * noisy) * T * V,
        ),
        name="verify",
    )(first[None], hidden_TD, head_VD, *columns)


def _step(
    first_ref,
    hidden_ref,
    head_ref,
    floats_ref,
    integers_ref,
    place_ref,
    others_ref,
    *z_refs,
    per: int,
    count: int,
    noisy: bool,
):
    """Logits of a tile of rows and one of tokens, and draws of the one before."""
    v = pl.program_id(2)
    pl.when(v == 0)(lambda: drawing.begin(place_ref, others_ref, certainty=False))
    rows, width = z_refs[0].shape
    # Before a core's first tile there is none.
    start = jnp.where(v == 0, count, (pl.program_id(0) * per + v - 1) * width)
    tile = drawing.Tile(start, count, first_ref[0], None)
    columns, outputs = (floats_ref, integers_ref), (place_ref, others_ref)
    D = hidden_ref.shape[1]
    chunk = next(size for size in _CHUNKS if D % size == 0)
    turns, eights = D // chunk, rows // drawing.SUBLANES
    at_once = pl.cdiv(eights, turns)

    def turn(n, old_ref, new_ref, draws: int):
        """One part of the sums that logits are, and draws of some rows meanwhile."""
        at = pl.ds(pl.multiple_of(n * chunk, chunk), chunk)
        part = products(hidden_ref[:, at], head_ref[:, at])
        for i in range(draws):
            r = n * at_once + i
            drawing.extend(
                *(r, old_ref, tile, columns, outputs), certainty=False, noisy=noisy
            )
        new_ref[...] += part

    def work(old_ref, new_ref):
        new_ref[...] = jnp.zeros((rows, width), jnp.float32)
        full, rest = divmod(eights, at_once)

        def both(n, _):
            turn(n, old_ref, new_ref, at_once)
            return _

        def product(n, _):
            turn(n, old_ref, new_ref, 0)
            return _

        jax.lax.fori_loop(0, full, both, 0)
        if rest:
            turn(full, old_ref, new_ref, rest)
        jax.lax.fori_loop(full + (rest > 0), turns, product, 0)

    pl.when(v % 2 == 0)(lambda: work(*z_refs))
    pl.when(v % 2 == 1)(lambda: work(*z_refs[::-1]))
