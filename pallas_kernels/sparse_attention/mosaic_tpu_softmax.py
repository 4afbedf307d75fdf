"""An online softmax over chunks of rows that are keys and values, in a TPU's kernel.

The softmax of some queries runs on the vector units while the matrix units make the
scores of the next: so a chunk is done a few queries at a time.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.precision import product

LOG2E = math.log2(math.e)
UNSEEN = -1e30
# Rows (queries x heads) of which scores are made at once.
BLOCK_ROWS = 192


class Softmax(NamedTuple):
    """What there is so far of a group's softmax; M rows are queries x heads.

    Attributes:
      queries: [M, H], as they meet keys.
      sinks: [M, 1], a logit that takes weight and gives nothing; in units of log 2.
      highest: [M, 1], the highest score, in the same units.
      weights: [M, 1], sum of weights, relative to that of the highest score.
      sums: [M, H], of weighted rows.
      heads: N.
      scale: of scores.
    """

    queries: Any
    sinks: Any
    highest: Any
    weights: Any
    sums: Any
    heads: int
    scale: float

    def take_in(self, k_SH, seen, *, first=False):
        """A chunk of rows, of which a query sees those that `seen(query)` [1, S] says.

        The first chunk begins a softmax, with the sink alone.
        """
        N, count = self.heads, self.queries.shape[0] // self.heads
        size = min(max(1, BLOCK_ROWS // N), -(-count // 2))
        blocks = [range(q, min(q + size, count)) for q in range(0, count, size)]
        ahead = self._scores(blocks[0], k_SH, seen)
        for block, following in zip(blocks, [*blocks[1:], None]):
            s_MS = ahead
            if following is not None:
                ahead = self._scores(following, k_SH, seen)
            rows = pl.ds(block[0] * N, len(block) * N)
            old_M1 = self.sinks[rows] if first else self.highest[rows]
            m_M1 = jnp.maximum(old_M1, s_MS.max(-1, keepdims=True))
            p_MS, keep_M1 = jnp.exp2(s_MS - m_M1), jnp.exp2(old_M1 - m_M1)
            self.highest[rows] = m_M1
            l_M1 = keep_M1 if first else keep_M1 * self.weights[rows]
            self.weights[rows] = l_M1 + p_MS.sum(-1, keepdims=True)
            o_MH = product(p_MS.astype(k_SH.dtype), k_SH, (1, 0))
            self.sums[rows] = o_MH if first else keep_M1 * self.sums[rows] + o_MH

    def _scores(self, block, k_SH, seen):
        N = self.heads
        q_MH = self.queries[pl.ds(block[0] * N, len(block) * N)]
        s_MS = product(q_MH, k_SH, (1, 1)) * (self.scale * LOG2E)
        parts = [s_MS[k * N : (k + 1) * N] for k in range(len(block))]
        return jnp.concatenate(
            [jnp.where(seen(q), part, UNSEEN) for q, part in zip(block, parts)]
        )
