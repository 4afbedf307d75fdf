"""Position-indexed key/value caches.

Row s of a slot belongs to absolute position s and to nothing else. Rows at or past a
slot's length are garbage that no query sees (finite garbage: a weight of 0 does not
silence a NaN), so rolling back a rejected draft is *not advancing the length*: no copy,
no undo.

Each layer has its own pair of arrays [B, K, S, H]: the products of attention read them
as they lie (batch axes leading), and writing is a scatter of rows into a donated
buffer. A TPU tiles the last axis in 128 lanes. For narrower heads XLA would rather lay
positions along the lanes and copies whole caches between the two layouts; storing such
heads zero-padded to 128 costs the same memory and no copy, hence `lanes`.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxspark.models.batch import FlatTokens
from jaxspark.models.pages import PAGE
from pallas_kernels.dispatch import expected_platform
from pallas_kernels.ragged import writable


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one attention layer, [B, K, S, H] each; H may be padded.

    With pages, B are pages and S positions of a page.
    """

    k_BKSH: Float[Array, "B K S H"]
    v_BKSH: Float[Array, "B K S H"]
    grows: ClassVar[bool] = True

    @classmethod
    def zeros(
        cls,
        slots: int,
        heads: int,
        length: int,
        head_dim: int,
        dtype,
    ) -> "LayerCache":
        """An empty cache for `slots` sequences of up to `length` positions."""
        # TPUs read positions by sixteens.
        length = -(-length // 16) * 16 if lanes() > 1 else length
        shape = (slots, heads, length, padded_width(head_dim))
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def write(
        self,
        k_TKH: Float[Array, "T K H"],
        v_TKH: Float[Array, "T K H"],
        tokens: FlatTokens,
    ) -> "LayerCache":
        """Stores each token's row at its slot and position; padding is skipped."""
        B, K, S, H = self.k_BKSH.shape
        # Rows are addressed in the flat [B*K*S, H] table: a scatter over one leading
        # axis is done in place on every platform (over axes 0 and 2 TPUs copy).
        slots_T, places_T = tokens.slots_T, tokens.positions_T
        keep_T = slots_T >= 0
        if tokens.pages_BP is None:
            keep_T &= places_T < S
        else:
            slots_T, may_T = writable(tokens.pages_BP, slots_T, places_T // S)
            keep_T, places_T = keep_T & may_T, places_T % S
        heads_TK = slots_T[:, None] * K + jnp.arange(K)
        row_TK = heads_TK * S + places_T[:, None]
        row_TK = jnp.where(keep_T[:, None], row_TK, B * K * S)

        def rows(cache_BKSH, new_TKH):
            new_TKH = pad_heads(new_TKH.astype(cache_BKSH.dtype), H)
            table = cache_BKSH.reshape(-1, H).at[row_TK].set(new_TKH, mode="drop")
            # Without the barrier XLA may fuse the write into each of its readers, and
            # so copies the cache (seen on CPU with a single token).
            return jax.lax.optimization_barrier(table.reshape(B, K, S, H))

        return LayerCache(rows(self.k_BKSH, k_TKH), rows(self.v_BKSH, v_TKH))

    def at_slots(self, slots_N: Int[Array, " N"]) -> "LayerCache":
        """The rows of N slots; numbers past the last slot read the last."""
        return jax.tree.map(lambda x: x.at[slots_N].get(mode="clip"), self)

    def with_slots(self, slots_N: Int[Array, " N"], rows: "LayerCache") -> "LayerCache":
        """With the rows of N slots replaced; numbers past the last are skipped."""
        return jax.tree.map(
            lambda x, new: x.at[slots_N].set(new, mode="drop"), self, rows
        )

    def pool(self, pages: int) -> "LayerCache":
        """Empty pages."""
        _, K, _, H = self.k_BKSH.shape
        return LayerCache.zeros(pages, K, PAGE, H, self.k_BKSH.dtype)


def lanes() -> int:
    """What the width of a cache's rows is a multiple of: 128 for TPUs, else 1."""
    return 128 if expected_platform() == "tpu" else 1


def padded_width(width: int) -> int:
    """Width of a cache's rows."""
    return -(-width // lanes()) * lanes()


def pad_heads(x_H: Float[Array, "... h"], width: int) -> Float[Array, "... H"]:
    """Zero-pads head vectors to a cache's width; products over them do not change."""
    missing = width - x_H.shape[-1]
    if not missing:
        return x_H
    return jnp.pad(x_H, [(0, 0)] * (x_H.ndim - 1) + [(0, missing)])
