"""`top_k` of long rows for GPUs: scores are read twice, and most of them once.

A row is cut into blocks. Who is among its k best scores lies in one of the k blocks of
highest maxima: behind any other there are k blocks, each with a score that is higher,
or as high and before. So the maxima are chosen among, then the scores of their blocks,
both as rows are, until they are short enough for `bisection`, which reads a row 16
times, or for a kernel. Blocks of w scores make C / w maxima and leave k w scores: of
262,144 scores, 512 of which are chosen, 16,384 and 8,192. Where maxima come with the
scores, most of these are not read at all.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.top_k.bisection import highest, ordered

# Rows that two stages make less than so many times shorter are bisected as they are.
SHORTER = 4


def width(entries: int, k: int) -> int:
    """Of a block: the power of two about which maxima and scores left are as many."""
    return 1 << max((entries // k).bit_length() // 2, 0)


def supports(scores_TC, limits_T, best_Tc, *, k) -> str | None:
    """Why it does not choose among these; None if it does."""
    entries = scores_TC.shape[1]
    if width(entries, k) < SHORTER:
        return f"is for rows of {SHORTER**2} k scores and more, not {entries} for {k}"
    return None


def top_k_two_stage(
    scores_TC: Float[Array, "T C"],
    limits_T: Int[Array, " T"],
    best_Tc: Float[Array, "T c"] | None = None,
    *,
    k: int,
    highest: Callable = highest,
    few: int = 0,
) -> Int[Array, "T X"]:
    """See `api.top_k`; lower entries come first.

    What is left is chosen among by `highest`; `few` scores are not worth two stages.
    """
    limits_T = jnp.minimum(limits_T, scores_TC.shape[1])

    def keys(scores_T, place_T):
        limits = limits_T.reshape(-1, *[1] * (scores_T.ndim - 1))
        return jnp.where(place_T < limits, ordered(scores_T), 0)

    return best(scores_TC, k, keys, best_Tc, highest=highest, few=few)


def best(
    x_TC: Shaped[Array, "T C"],
    k: int,
    keys: Callable = lambda x_T, place_T: x_T,
    best_Tc: Shaped[Array, "T c"] | None = None,
    **how,
) -> Int[Array, "T X"]:
    """Places of the k highest keys above 0, in order; -1 behind the last.

    Args:
      x_TC: what keys are made of.
      k: places to choose.
      keys: of x and places; made after what is left is gathered, so that this reads
        nothing else.
      best_Tc: x of the highest key of every block, if it is known.
      **how: `highest` and `few`, as `top_k_two_stage` has them.
    """
    C = x_TC.shape[1]
    size = width(C, k)
    if size < SHORTER or C <= how["few"]:
        return how["highest"](keys(x_TC, jnp.arange(C)), k)
    if best_Tc is not None:
        size = 1 << (-(-C // best_Tc.shape[1]) - 1).bit_length()
    x_TC = jnp.pad(x_TC, ((0, 0), (0, -C % size)))
    x_Tnb = x_TC.reshape(len(x_TC), -1, size)
    if best_Tc is None:
        place_nb = jnp.arange(x_TC.shape[1]).reshape(-1, size)
        highest_Tn = keys(x_Tnb, place_nb).max(-1)
    else:
        highest_Tn = keys(best_Tc, size * jnp.arange(best_Tc.shape[1]))
    # Not fused into what reads them again and again.
    block_TX1 = best(jax.lax.optimization_barrier(highest_Tn), k, **how)[..., None]
    left_TXb = jnp.take_along_axis(x_Tnb, block_TX1, axis=1, mode="clip")
    left_TXb = keys(left_TXb, block_TX1 * size + jnp.arange(size))
    left_TXb = jax.lax.optimization_barrier(jnp.where(block_TX1 < 0, 0, left_TXb))
    left_TX = best(left_TXb.reshape(len(x_TC), -1), k, **how)
    own_TX = jnp.take_along_axis(
        block_TX1[..., 0], left_TX // size, axis=1, mode="clip"
    )
    return jnp.where(left_TX < 0, -1, own_TX * size + left_TX % size)
