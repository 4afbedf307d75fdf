"""Dense decoders: Llama and Qwen3, one family.

    x = embed(ids)
    x = x + attention(norm(x));  x = x + mlp(norm(x))      for every layer
    logits = head(norm(x))

Parameter paths are the names of Hugging Face checkpoints without the prefix "model."
(`layers.0.self_attn.q_proj.weight`), shapes too, so loading is a walk over the tree.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxspark.models.batch import FlatTokens
from jaxspark.models.cache import LayerCache
from jaxspark.models.layers.attention import Attention
from jaxspark.models.layers.linear import Embedding, Linear, head_logits
from jaxspark.models.layers.mlp import GatedMLP
from jaxspark.models.layers.norm import RMSNorm
from jaxspark.models.layers.rope import RopeConfig, Rotation
from jaxspark.settings import standard_settings


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """Architecture of a dense decoder, under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    qk_norm: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} query heads cannot share "
                f"{self.num_key_value_heads} key/value heads evenly"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rope, got {self.head_dim}")


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP with residuals; also the layer of draft backbones."""

    def __init__(self, config: DenseConfig, *, dtype, rngs: nnx.Rngs):
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(D, eps=eps, dtype=dtype)
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(D, eps=eps, dtype=dtype)
        self.mlp = GatedMLP(
            D, config.intermediate_size, bias=config.mlp_bias, dtype=dtype, rngs=rngs
        )

    def __call__(
        self,
        x_TD: Float[Array, "T D"],
        cache: LayerCache,
        tokens: FlatTokens,
        rotation: Rotation,
    ) -> tuple[Float[Array, "T D"], LayerCache]:
        """One layer on flat tokens; returns its output and the written cache."""
        with jax.named_scope("attention"):
            h_TD = self.input_layernorm(x_TD)
            h_TD, cache = self.self_attn(h_TD, cache, tokens, rotation)
        return self.after_attention(x_TD, h_TD), cache

    def after_attention(
        self, x_TD: Float[Array, "T D"], attended_TD: Float[Array, "T D"]
    ) -> Float[Array, "T D"]:
        """The rest of the layer, given what attention writes."""
        x_TD = x_TD + attended_TD
        with jax.named_scope("mlp"):
            return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


class DenseDecoder(nnx.Module):
    """A Llama or Qwen3 language model; holds parameters and its configuration only."""

    def __init__(self, config: DenseConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs
        )
        self.layers = nnx.List(
            DecoderLayer(config, dtype=dtype, rngs=rngs)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        tied = config.tie_word_embeddings
        self.lm_head = (
            None
            if tied
            else Linear(config.hidden_size, config.vocab_size, dtype=dtype, rngs=rngs)
        )

    @property
    def dtype(self):
        """Type of parameters, activations and caches."""
        return self.embed_tokens.weight.dtype

    @property
    def max_rewind(self) -> None:
        """Positions that a slot may be set back by: any number, rows stay."""
        return None

    @property
    def head_VD(self) -> Float[Array, "V D"]:
        """The LM head's matrix: the embedding table where they are tied."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return head.weight[...]

    def init_cache(self, slots: int, length: int) -> tuple[LayerCache, ...]:
        """Empty caches for `slots` sequences of up to `length` positions."""
        c = self.config
        size = (slots, c.num_key_value_heads, length, c.head_dim, self.dtype)
        return tuple(LayerCache.zeros(*size) for _ in self.layers)

    def embed(self, ids_T: Int[Array, " T"]) -> Float[Array, "T D"]:
        """Embedding rows of token ids."""
        return self.embed_tokens(ids_T)

    def logits(self, x_TD: Float[Array, "T D"]) -> Float[Array, "T V"]:
        """float32 logits of final hidden states, the last norm included."""
        with jax.named_scope("head"):
            return head_logits(self.norm(x_TD), self.head_VD)

    @standard_settings()
    def __call__(
        self,
        tokens: FlatTokens,
        cache: Sequence[LayerCache],
        *,
        taps: Sequence[int] = (),
    ) -> tuple[Float[Array, "T D"], Float[Array, "T m D"], tuple[LayerCache, ...]]:
        """Processes T flat tokens of any mix of slots.

        Args:
          tokens: what to process; each token sees its slot's positions below its limit.
          cache: one `LayerCache` per layer, holding all earlier positions.
          taps: layers whose outputs to return, 0-based; -1 is the embedding.

        Returns:
          Final hidden states before the last norm (see `logits`), the taps in the
          order asked for [T, m, D], and the cache with the tokens' rows written.
        """
        rotation = Rotation.at(
            self.config.rope, self.config.head_dim, tokens.positions_T
        )
        with jax.named_scope("embed"):
            x_TD = self.embed(tokens.ids_T)
        outputs = {-1: x_TD}
        written = []
        for index, (layer, layer_cache) in enumerate(zip(self.layers, cache)):
            with jax.named_scope(f"layer_{index}"):
                x_TD, layer_cache = layer(x_TD, layer_cache, tokens, rotation)
            outputs[index] = x_TD
            written.append(layer_cache)
        taps_TmD = (
            jnp.stack([outputs[tap] for tap in taps], axis=1)
            if taps
            else jnp.zeros((len(x_TD), 0, x_TD.shape[1]), x_TD.dtype)
        )
        return x_TD, taps_TmD, tuple(written)
