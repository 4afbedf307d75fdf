"""Queries and outputs in a GPU's shared memory: normed and turned, and turned back.

Of 64 heads of one query [2, 64, H / 2] each of two warpgroups has one half of the
width; the second has the channels that turn. Pairs of channels lie in the registers of
one thread, but are turned by a right angle by the matrix units, as on TPUs: exactly,
since what is turned is in bfloat16.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROW, COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
TURNING = 64  # channels, at most


def take_in(q_buf, sums_buf, turn, *, norm, meet):
    """Queries as they meet keys, in place; both warpgroups come here.

    Args:
      q_buf: [2, 64, H / 2], as it came from memory.
      sums_buf: [2, 64], for sums of squares.
      turn: see `turning`; None: they do not turn.
      norm: epsilon of their norm; None: they are not normed.
      meet: waits for the other warpgroup.
    """
    me = jax.lax.axis_index("warpgroup")
    halves, _, width = q_buf.shape
    pieces = [
        q_buf.at[me, :, pl.ds(first, TURNING)] for first in range(0, width, TURNING)
    ]

    def piece(ref):
        return plgpu.load(ref, layout=plgpu.Layout.WGMMA).astype(jnp.float32)

    length_N = None
    if norm is not None:
        sums_buf[me] = sum(jnp.square(piece(ref)).sum(1) for ref in pieces)
        meet()
        square_N = sum(
            plgpu.load(sums_buf.at[half], layout=ROW, optimized=False)
            for half in range(halves)
        )
        length_N = jax.lax.rsqrt(square_N / (halves * width) + norm)

    def put(ref, x_NL):
        if length_N is not None:
            x_NL *= jax.lax.broadcast_in_dim(length_N, x_NL.shape, [0])
        ref[...] = x_NL.astype(ref.dtype)

    turns = turn is not None
    for ref in pieces[: len(pieces) - turns]:
        put(ref, piece(ref))
    if turns:
        last = pieces[-1]
        pl.when(me < halves - 1)(lambda: put(last, piece(last)))
        pl.when(me == halves - 1)(lambda: put(last, turn(last, 1)))
    plgpu.commit_smem()
    meet()


def give_out(o_buf, turn):
    """Outputs turned back, in place."""
    halves, _, width = o_buf.shape
    last = o_buf.at[halves - 1, :, pl.ds(width - TURNING, TURNING)]

    @pl.when(jax.lax.axis_index("warpgroup") == halves - 1)
    def _():
        plgpu.commit_smem()
        last[...] = turn(last, -1).astype(last.dtype)


def turning(turns_ref, angles_buf):
    """How last channels turn: by a token's cos and sin [2, 64], and `right_angles`."""

    def turn(ref, direction):
        """x cos +- (x P) sin in float32, of [64 heads, 64]."""

        def across(acc_ref):
            plgpu.wgmma(acc_ref, ref, angles_buf)
            return acc_ref[...]

        across_NL = pl.run_scoped(across, plgpu.ACC(ref.shape, jnp.float32))
        cos_NL, sin_NL = (
            jax.lax.broadcast_in_dim(
                plgpu.load(turns_ref.at[n], layout=COLUMN, optimized=False),
                ref.shape,
                [1],
            )
            for n in range(2)
        )
        x_NL = plgpu.load(ref, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        return x_NL * cos_NL + across_NL * (direction * sin_NL)

    return turn
