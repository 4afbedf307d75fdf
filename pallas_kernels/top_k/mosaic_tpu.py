"""`top_k` on TPUs: scores are read once, places are all that is written.

Eight rows of scores lie in VMEM, as integers in the order of the scores, one register
of 8 x 128 after the other. The k-th best is found by its 31 bits, from the highest
down: each asks how many are as good, a compare and an add per register. (A sort of
32,768 scores, which XLA would make of it, takes 15 times as long.)

Places come out in order. Where a row's chosen scores lie is counted along its C / 128
registers; the j-th chosen one lies in the first register up to which more than j are
counted, there in the first lane where that is so. Both are compares and sums of
[C / 128, k] and [128, k]; the counts of one register among many are picked by a product
with a 0/1 matrix, since a core has no gather of its own. Counts up to 128 are exact in
bfloat16.

    R  rows at once, 8     n  registers of a row, C / 128     X  places chosen, k
    b  lanes, 128
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.ragged import LANES
from pallas_kernels.top_k.bisection import FEW

ROWS = 8
# Registers of a row that are worked on together.
GROUP = 16
LOWEST = jnp.iinfo(jnp.int32).min
# So many scores of eight rows fit into VMEM.
MOST = 2**18


def supports(scores_TC, limits_T, *, k) -> str | None:
    """Why the kernel cannot choose among these; None if it can."""
    if not FEW < (entries := scores_TC.shape[1]) <= MOST:
        return f"is for {FEW + 1} to {MOST} scores of a row, not {entries}"
    return None


def top_k_mosaic_tpu(
    scores_TC: Float[Array, "T C"], limits_T: Int[Array, " T"], *, k: int
) -> Int[Array, "T X"]:
    """See `api.top_k`; lower places come first."""
    T, C = scores_TC.shape
    k = min(k, C)
    rows = pl.cdiv(T, ROWS) * ROWS
    chunks = pl.cdiv(C, GROUP * LANES) * GROUP
    width = pl.cdiv(k, LANES) * LANES
    limits_TX = jnp.broadcast_to(limits_T.astype(jnp.int32)[:, None], (T, LANES))
    registers = chunks, ROWS, LANES
    places_TX = pl.pallas_call(
        functools.partial(_kernel, k=k),
        out_shape=jax.ShapeDtypeStruct((rows, width), jnp.int32),
        grid=(rows // ROWS,),
        in_specs=[
            pl.BlockSpec((ROWS, LANES), lambda i: (i, 0)),
            pl.BlockSpec((ROWS, chunks * LANES), lambda i: (i, 0)),
        ],
        out_specs=pl.BlockSpec((ROWS, width), lambda i: (i, 0)),
        scratch_shapes=[
            pltpu.VMEM(registers, dtype)
            for dtype in (jnp.int32, jnp.float32, jnp.float32)
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            # Scores come in while others are worked on.
            vmem_limit_bytes=2**23 + 4 * 5 * ROWS * chunks * LANES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * chunks * LANES * (2 * LANES + width),
            bytes_accessed=4 * rows * (chunks * LANES + width),
            transcendentals=0,
        ),
        name="top_k",
    )(limits_TX, scores_TC.astype(jnp.float32))
    return places_TX[:T, :k]


def _kernel(limits_ref, scores_ref, places_ref, key_ref, upto_ref, before_ref, *, k):
    groups = key_ref.shape[0] // GROUP
    lane_Rb = jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)

    for_each_group = functools.partial(jax.lax.fori_loop, 0, groups)

    def order(group, _):
        for n in range(GROUP):
            at = pl.multiple_of((group * GROUP + n) * LANES, LANES)
            scores_Rb = scores_ref[:, pl.ds(at, LANES)]
            bits_Rb = pltpu.bitcast(
                jnp.where(scores_Rb == 0, 0.0, scores_Rb), jnp.int32
            )
            keys_Rb = jnp.where(bits_Rb < 0, bits_Rb ^ 0x7FFFFFFF, bits_Rb)
            visible_Rb = at + lane_Rb < limits_ref[...]
            key_ref[group * GROUP + n] = jnp.where(visible_Rb, keys_Rb, LOWEST)

    for_each_group(order, None)

    def keys(group):
        return key_ref[pl.ds(group * GROUP, GROUP)]

    def reached(least_R1):
        def turn(group, count_nRb):
            return count_nRb + jnp.where(keys(group) >= least_R1, 1, 0)

        zeros_nRb = jnp.zeros((GROUP, ROWS, LANES), jnp.int32)
        count_Rb = jnp.sum(for_each_group(turn, zeros_nRb), axis=0)
        return jnp.sum(count_Rb, axis=1, keepdims=True)

    def bisect(index, least_R1):
        tried_R1 = least_R1 + jnp.left_shift(jnp.int32(1), 30 - index)
        return jnp.where(reached(tried_R1) >= k, tried_R1, least_R1)

    zero_R1 = jnp.zeros((ROWS, 1), jnp.int32)
    kth_R1 = jnp.where(reached(zero_R1) >= k, zero_R1, LOWEST)
    kth_R1 = jax.lax.fori_loop(0, 31, bisect, kth_R1)
    missing_R1 = (k - reached(kth_R1 + 1)).astype(jnp.float32)

    from_bb, to_bb = (
        jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1)
    )
    upto_bb = jnp.where(from_bb <= to_bb, 1.0, 0.0)
    every_bb = jnp.ones((LANES, LANES), jnp.float32)

    def counted(chosen_nRb, before_Rb):
        """Of registers: up to each lane, all of them and of those before."""
        ones_NB = jnp.where(chosen_nRb, 1.0, 0.0).reshape(GROUP * ROWS, LANES)
        upto_nRb, all_nRb = (
            jnp.dot(ones_NB, each, preferred_element_type=jnp.float32).reshape(
                GROUP, ROWS, LANES
            )
            for each in (upto_bb, every_bb)
        )
        totals = []
        for n in range(GROUP):
            before_Rb = before_Rb + all_nRb[n]
            totals.append(before_Rb)
        return upto_nRb, jnp.stack(totals) - all_nRb, before_Rb

    def count(group, before):
        equal_Rb, chosen_Rb = before
        keys_nRb = keys(group)
        equal_nRb = (keys_nRb == kth_R1) & (keys_nRb > LOWEST)
        upto_nRb, before_nRb, equal_Rb = counted(equal_nRb, equal_Rb)
        first_nRb = before_nRb + upto_nRb <= missing_R1
        chosen_nRb = (keys_nRb > kth_R1) | (equal_nRb & first_nRb)
        upto_nRb, before_nRb, chosen_Rb = counted(chosen_nRb, chosen_Rb)
        here = pl.ds(group * GROUP, GROUP)
        upto_ref[here], before_ref[here] = upto_nRb, before_nRb
        return equal_Rb, chosen_Rb

    zeros_Rb = jnp.zeros((ROWS, LANES), jnp.float32)
    _, chosen_Rb = for_each_group(count, (zeros_Rb, zeros_Rb))

    n_nb = jax.lax.broadcasted_iota(jnp.int32, (groups * GROUP, LANES), 0)
    n_nb = n_nb.astype(jnp.float32)
    for row in range(ROWS):
        before_nb, upto_nb = before_ref[:, row], upto_ref[:, row]
        for first in range(0, places_ref.shape[1], LANES):
            rank_1X = (first + lane_Rb[:1]).astype(jnp.float32)
            # The last register before which no more than j are counted.
            reached_nX = before_nb <= rank_1X
            chunk_1X = jnp.sum(jnp.where(reached_nX, 1.0, 0.0), 0, keepdims=True) - 1
            start_1X = jnp.max(jnp.where(reached_nX, before_nb, 0.0), 0, keepdims=True)
            upto_bX = jax.lax.dot_general(
                upto_nb,
                jnp.where(n_nb == chunk_1X, 1.0, 0.0),
                (((0,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            behind_bX = upto_bX <= rank_1X - start_1X
            lane_1X = jnp.sum(jnp.where(behind_bX, 1.0, 0.0), 0, keepdims=True)
            place_1X = (LANES * chunk_1X + lane_1X).astype(jnp.int32)
            there_1X = rank_1X < chosen_Rb[row : row + 1]
            places_ref[row : row + 1, first : first + LANES] = jnp.where(
                there_1X, place_1X, -1
            )
