"""What both kernels of `mosaic_gpu_backward` do: heads come in, weights are made.

Of 64 x 32 scores and gradients of weights, each as products over the whole width, one
warpgroup makes the first and one the second: the smallest products that keep the matrix
units busy. The first turns its scores to weights p and hands them on in shared memory,
the second makes of them the gradients ds of scores; both then have both.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.sparse_attention.mosaic_gpu_queries import TURNING
from pallas_kernels.sparse_attention.mosaic_gpu_rows import HALVES, TILE_ROWS

# What is known of a query's heads: for either warpgroup what its products are
# multiplied by, then what is taken off; and by how much of a query its norm shortens
# the query's gradient.
FACTOR, SHIFT, NORM, STATS = 0, 2, 4, 5
# Of a token: where its slot's rows begin, the first recent row that it reads, chunks of
# recent rows and of all, from and to which recent row it sees, how many entries.
BASE, FIRST, RECENT, CHUNKS, OLDEST, NEWEST, LIMIT = range(7)


def copies_of(heads: int, width: int) -> int:
    """That bring some heads of a query, whose halves are so wide."""
    return HALVES - 1 + heads // TILE_ROWS * (1 + (width > TURNING))


def fetch_heads(source_ref, tail_ref, t, heads, target, barrier):
    """Asks for heads of a query [2, heads, H / 2], by `copies_of` copies.

    Their last channels, which turn, lie turned in `tail_ref`. What comes side by side
    with them comes in rows of tiles, of which a copy can fill a part.
    """
    rows, width = target.shape[1:]
    still = width - TURNING

    def copy(ref, first, half, rows, at, size):
        plgpu.copy_gmem_to_smem(
            ref.at[t, pl.ds(heads + rows.start, rows.size), pl.ds(first, size)],
            target.at[half, rows, pl.ds(at, size)],
            barrier,
        )

    for half in range(HALVES - 1):
        copy(source_ref, half * width, half, pl.ds(0, rows), 0, width)
    for row in range(0, rows, TILE_ROWS):
        tile = pl.ds(row, TILE_ROWS)
        if still:
            copy(source_ref, (HALVES - 1) * width, HALVES - 1, tile, 0, still)
        copy(tail_ref, 0, HALVES - 1, tile, still, TURNING)


def sees(row, is_recent, tokens_ref, t, entries):
    """Whether a token sees rows of its slot, of which entries lie behind recent ones.

    Args:
      row: which rows.
      is_recent: whether they are recent ones.
      tokens_ref: integers of every token.
      t: the token.
      entries: row of the first entry.
    """
    oldest, newest, limit = (tokens_ref[t, k] for k in (OLDEST, NEWEST, LIMIT))
    low = jnp.where(is_recent, oldest, entries)
    high = jnp.where(is_recent, newest, entries + limit)
    return (row >= low) & (row < high)


def weigh(x, seen, factor, shift, w_buf, weighed):
    """Makes weights and the gradients of scores; both warpgroups come here.

    Args:
      x: of the first warpgroup scores, of the second gradients of weights.
      seen: which of them are real.
      factor: by head, see `FACTOR`.
      shift: by head, see `SHIFT`.
      w_buf: [2, 64, 32], to hold p and ds.
      weighed: barriers of one arrival, of either.
    """
    me = jax.lax.axis_index("warpgroup")
    x = x * factor - shift

    def there():
        plgpu.commit_smem()
        plgpu.barrier_arrive(weighed.at[me])

    @pl.when(me == 0)
    def _():
        w_buf[0] = jnp.where(seen, jnp.exp2(x), 0.0).astype(w_buf.dtype)
        there()
        plgpu.barrier_wait(weighed.at[1])

    @pl.when(me == 1)
    def _():
        plgpu.barrier_wait(weighed.at[0])
        p = plgpu.load(w_buf.at[0], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        # Where nothing is seen, gradients of weights may be no numbers.
        w_buf[1] = jnp.where(p > 0, p * x, 0.0).astype(w_buf.dtype)
        there()
