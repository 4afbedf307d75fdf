"""Grouped-query attention over a position-indexed cache, on flat tokens.

Each token's key and value rows are written first, then queries read the cache up to
their limit. Llama has no q/k norm, Qwen3 one per head.
"""

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxspark.models.batch import FlatTokens
from jaxspark.models.cache import LayerCache, pad_heads
from jaxspark.models.layers.linear import Linear
from jaxspark.models.layers.norm import RMSNorm
from jaxspark.models.layers.rope import Rotation
from jaxspark.models.pages import readable
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
        self.kv_heads, self.head_dim = K, H

    def update_cache(
        self,
        x_TI: Float[Array, "T I"],
        cache: LayerCache,
        tokens: FlatTokens,
        rotation: Rotation,
    ) -> LayerCache:
        """Writes the key/value rows of `x_TI` at the tokens' positions."""
        k_TKH, v_TKH = self.keys_values(x_TI, rotation)
        return cache.write(k_TKH, v_TKH, tokens)

    def keys_values(
        self, x_TI: Float[Array, "T I"], rotation: Rotation
    ) -> tuple[Float[Array, "T K H"], Float[Array, "T K H"]]:
        """Keys, normed and rotated, and values."""
        k_TKH = _heads(self.k_proj(x_TI), self.head_dim)
        v_TKH = _heads(self.v_proj(x_TI), self.head_dim)
        if self.k_norm is not None:
            k_TKH = self.k_norm(k_TKH)
        return rotation(k_TKH), v_TKH

    def queries(
        self, x_TI: Float[Array, "T I"], rotation: Rotation
    ) -> Float[Array, "T N H"]:
        """Queries, normed and rotated."""
        q_TNH = _heads(self.q_proj(x_TI), self.head_dim)
        if self.q_norm is not None:
            q_TNH = self.q_norm(q_TNH)
        return rotation(q_TNH)

    def __call__(
        self,
        x_TI: Float[Array, "T I"],
        cache: LayerCache,
        tokens: FlatTokens,
        rotation: Rotation,
    ) -> tuple[Float[Array, "T D"], LayerCache]:
        """Writes the tokens' rows, then lets each attend up to its limit."""
        cache = self.update_cache(x_TI, cache, tokens, rotation)
        q_TNH = pad_heads(self.queries(x_TI, rotation), cache.k_BKSH.shape[-1])
        with jax.named_scope("cached_attention"):
            o_TNH = cached_attention(
                q_TNH,
                cache.k_BKSH,
                cache.v_BKSH,
                tokens,
                tokens.limits_T,
                scale=self.head_dim**-0.5,
                pages_BP=readable(tokens.pages_BP),
            )
        o_TNH = o_TNH[..., : self.head_dim]
        return self.o_proj.summed(o_TNH.reshape(len(o_TNH), -1)), cache


def _heads(y_TX: Float[Array, "T X"], width: int) -> Float[Array, "T N H"]:
    """Rows cut into heads, as many as this shard has."""
    return y_TX.reshape(len(y_TX), -1, width)
