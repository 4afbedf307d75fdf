"""`top_k` without a sort and without a kernel, for GPUs and the longest rows.

The k-th best score is found by its bits, from the highest down: of four numbers that
begin with what is known, it is the highest that k scores reach. That takes 16 passes
over the scores, where a sort of C of them takes log2(C)^2 / 2 and moves their indices
along. What is above the k-th best is chosen, then of its equals as many as are missing,
the first of them.

The chosen ones are gathered block by block: the j-th lies in the first block behind
which more than j are counted, at the first place of it where that is so.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

BLOCK = 128
BITS = 2
# So few are sorted as quickly.
FEW = 1024


def supports(scores_TC, limits_T, best_Tc, *, k) -> str | None:
    """Why it does not choose among these; None if it does."""
    if (entries := scores_TC.shape[1]) <= FEW:
        return f"is for more than {FEW} scores of a row, not {entries}"
    return None


def top_k_bisection(
    scores_TC: Float[Array, "T C"],
    limits_T: Int[Array, " T"],
    best_Tc: Float[Array, "T c"] | None = None,
    *,
    k: int,
) -> Int[Array, "T X"]:
    """See `api.top_k`; lower entries come first."""
    visible_TC = jnp.arange(scores_TC.shape[1]) < limits_T[:, None]
    keys_TC = jnp.where(visible_TC, ordered(scores_TC), 0)
    return highest(keys_TC, min(k, scores_TC.shape[1]))


def highest(keys_TC: UInt32[Array, "T C"], k: int) -> Int[Array, "T X"]:
    """Places of the k highest keys above 0, in order; -1 behind the last."""
    lowest_T1 = kth_highest(keys_TC, k)[:, None]
    above_TC = keys_TC > lowest_T1
    equal_TC = (keys_TC == lowest_T1) & (keys_TC > 0)
    missing_T1 = k - above_TC.sum(-1, keepdims=True)
    chosen_TC = above_TC | (equal_TC & (jnp.cumsum(equal_TC, -1) <= missing_T1))
    return places(chosen_TC, k)


def ordered(scores: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """Numbers above 0 in the order of float32 scores; -0 is 0."""
    scores = scores.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0, scores), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def kth_highest(keys_TC: UInt32[Array, "T C"], k: int) -> UInt32[Array, " T"]:
    """The highest number that at least k keys of a row reach."""

    def turn(index, known_T):
        digit_D = jnp.arange(1, 2**BITS, dtype=jnp.uint32)
        shift = (32 - BITS - BITS * index).astype(jnp.uint32)
        tried_TD = known_T[:, None] | (digit_D << shift)
        reached_TD = (keys_TC[:, None] >= tried_TD[..., None]).sum(-1) >= k
        return known_T | (reached_TD.sum(-1, dtype=jnp.uint32) << shift)

    start_T = jnp.zeros(len(keys_TC), jnp.uint32)
    return jax.lax.fori_loop(0, 32 // BITS, turn, start_T)


def places(chosen_TC: Bool[Array, "T C"], k: int) -> Int[Array, "T X"]:
    """The first k places that are chosen, in order; -1 behind the last."""
    chosen_TC = jnp.pad(chosen_TC, ((0, 0), (0, -chosen_TC.shape[1] % BLOCK)))
    chosen_Tnb = chosen_TC.reshape(len(chosen_TC), -1, BLOCK)
    # Exact in float32: no count is above a block's length.
    upto_bb = jnp.triu(jnp.ones((BLOCK, BLOCK), jnp.bfloat16))
    counted_Tnb = jnp.matmul(
        chosen_Tnb.astype(jnp.bfloat16), upto_bb, preferred_element_type=jnp.float32
    ).astype(jnp.int32)
    counted_Tn = jnp.cumsum(counted_Tnb[..., -1], -1)
    rank_X = jnp.arange(k)
    before_TXn = counted_Tn[:, None] <= rank_X[:, None]
    block_TX = before_TXn.sum(-1)
    start_TX = jnp.where(before_TXn, counted_Tn[:, None], 0).max(-1)
    own_TXb = jnp.take_along_axis(counted_Tnb, block_TX[..., None], axis=1, mode="clip")
    inside_TX = (own_TXb <= (rank_X - start_TX)[..., None]).sum(-1)
    place_TX = block_TX * BLOCK + inside_TX
    return jnp.where(rank_X < counted_Tn[:, -1:], place_TX, -1)
