"""Grouped-query attention over a position-indexed cache, on flat tokens.

Each token's key and value rows are written first, then queries read the cache up to
their limit. Llama has no q/k norm, Qwen3 one per head.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxspark.models.batch import FlatTokens, SlotView
from jaxspark.models.cache import LayerCache, pad_heads
from jaxspark.models.layers.linear import Linear
from jaxspark.models.layers.norm import RMSNorm
from jaxspark.models.layers.rope import Rotation
from pallas_kernels import cached_attention


class Attention(nnx.Module):
    """Self-attention of N query heads over K key/value heads of width H."""

    def __init__(self, config, *, d_in: int | None = None, dtype, rngs: nnx.Rngs):
        """Inputs have the model's width D unless `d_in` says otherwise."""
        D, N, K, H = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        bias, d_in = config.attention_bias, D if d_in is None else d_in
        self.q_proj = Linear(d_in, N * H, bias=bias, dtype=dtype, rngs=rngs)
        self.k_proj = Linear(d_in, K * H, bias=bias, dtype=dtype, rngs=rngs)
        self.v_proj = Linear(d_in, K * H, bias=bias, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(N * H, D, bias=bias, dtype=dtype, rngs=rngs)
        eps = config.rms_norm_eps
        self.q_norm = RMSNorm(H, eps=eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(H, eps=eps, dtype=dtype) if config.qk_norm else None
        self.heads, self.kv_heads, self.head_dim = N, K, H

    def remember(
        self,
        x_DT: Float[Array, "D T"],
        cache: LayerCache,
        tokens: FlatTokens,
        view: SlotView,
        rotation: Rotation,
    ) -> LayerCache:
        """Writes the key/value rows of `x_DT` at the tokens' positions."""
        k_KHT, v_KHT = self.keys_values(x_DT, rotation)
        return cache.write(k_KHT, v_KHT, tokens, view)

    def keys_values(
        self, x_DT: Float[Array, "D T"], rotation: Rotation
    ) -> tuple[Float[Array, "K H T"], Float[Array, "K H T"]]:
        """Keys, normed and rotated, and values."""
        k_KHT = self.k_proj(x_DT).reshape(self.kv_heads, self.head_dim, -1)
        v_KHT = self.v_proj(x_DT).reshape(self.kv_heads, self.head_dim, -1)
        if self.k_norm is not None:
            k_KHT = self.k_norm(k_KHT)
        return rotation(k_KHT), v_KHT

    def queries(
        self, x_DT: Float[Array, "D T"], rotation: Rotation
    ) -> Float[Array, "N H T"]:
        """Queries, normed and rotated."""
        q_NHT = self.q_proj(x_DT).reshape(self.heads, self.head_dim, -1)
        if self.q_norm is not None:
            q_NHT = self.q_norm(q_NHT)
        return rotation(q_NHT)

    def __call__(
        self,
        x_DT: Float[Array, "D T"],
        cache: LayerCache,
        tokens: FlatTokens,
        view: SlotView,
        rotation: Rotation,
    ) -> tuple[Float[Array, "D T"], LayerCache]:
        """Remembers the tokens, then lets each attend up to its limit."""
        cache = self.remember(x_DT, cache, tokens, view, rotation)
        q_TNH = jnp.moveaxis(self.queries(x_DT, rotation), -1, 0)
        with jax.named_scope("cached_attention"):
            o_TNH = self._attend(q_TNH, cache, tokens, view)
        o_XT = o_TNH.reshape(q_TNH.shape[0], -1).T
        return self.o_proj(o_XT), cache

    def _attend(self, q_TNH, cache, tokens, view):
        """Flat queries -> per-slot rows [B, K, (Q N/K), H] -> flat outputs."""
        B, Q = view.index_BQ.shape
        K, H = self.kv_heads, self.head_dim
        groups = self.heads // K
        q_BQKgH = view.spread(q_TNH, 0).reshape(B, Q, K, groups, H)
        q_BKMH = jnp.moveaxis(q_BQKgH, 2, 1).reshape(B, K, Q * groups, H)
        limits_BM = jnp.repeat(view.spread(tokens.limits_T, 1), groups, axis=1)
        o_BKMH = cached_attention(
            pad_heads(q_BKMH, cache.k_BKSH.shape[-1]),
            cache.k_BKSH,
            cache.v_BKSH,
            limits_BM,
            scale=H**-0.5,
        )[..., :H]
        o_BQKgH = jnp.moveaxis(o_BKMH.reshape(B, K, Q, groups, H), 1, 2)
        return view.collect(o_BQKgH.reshape(B, Q, K * groups, H))
