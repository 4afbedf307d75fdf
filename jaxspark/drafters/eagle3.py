"""Eagle3: one autoregressive layer over the target's features (Li et al. 2025).

    f_i = W_fc [h_i^(t1); ...; h_i^(tm)]            features of position i
    g_i = layer([norm(e(x_{i+1})); norm(f_i)]) + ...  the pair (f_i, x_{i+1}) at place i
    q   = softmax(head(norm(g_i)))                  predicts x_{i+2}

Behind the newest pair the layer's own output takes the place of the feature it does not
have yet, token by token, so G drafts cost G passes of a small layer. As in DeepSpec,
rope positions are those of the feature, the head is the target's.

A pair is complete when the target has processed its token. `observe` therefore writes
the pair of the position before each token, with the embedding as one more tap (-1) and
the feature kept from the pass that made it.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxspark.drafters.base import (
    DraftContext,
    DraftSampler,
    Proposal,
    pairs_before,
)
from jaxspark.drafters.dspark import (
    Buffer,
    check_draft_vocab,
    check_same_target,
    check_taps,
)
from jaxspark.drafters.sequential import draft_block
from jaxspark.models import (
    DenseConfig,
    FlatTokens,
    LayerCache,
    TargetConfig,
    TargetModel,
)
from jaxspark.models.cache import pad_heads, padded_width
from jaxspark.models.layers.attention import Attention
from jaxspark.models.layers.linear import Linear, head_logits
from jaxspark.models.layers.mlp import GatedMLP
from jaxspark.models.layers.norm import RMSNorm
from jaxspark.models.layers.rope import Rotation
from jaxspark.models.rows import LayerRows


@dataclass(frozen=True, kw_only=True)
class Eagle3Config:
    """An Eagle3 drafter, under DeepSpec's and speculators' names.

    Attributes:
      backbone: architecture of the layer (`num_hidden_layers` is 1): Qwen3's, or
        Llama's without `qk_norm`.
      ttt_length: most tokens drafted at once, and the horizon it was trained for.
      target_layer_ids: taps, ascending 0-based target layers.
      num_target_layers: depth of the target it was made for.
      step_loss_decay: weight of a training step relative to the one before.
      draft_vocab_size: size of a pruned draft vocabulary; None for the target's.
      norm_before_fc: whether the layers' outputs are normed, all as one vector.
      norm_before_residual: whether the residual is the normed feature.
      norm_output: whether the feature passed on to the next draft is normed.
    """

    backbone: DenseConfig
    ttt_length: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    step_loss_decay: float = 0.8
    draft_vocab_size: int | None = None
    norm_before_fc: bool = False
    norm_before_residual: bool = False
    norm_output: bool = False

    def __post_init__(self):
        if self.backbone.num_hidden_layers != 1:
            raise ValueError(
                "Eagle3 has one layer, num_hidden_layers is "
                f"{self.backbone.num_hidden_layers}"
            )
        if self.ttt_length < 1:
            raise ValueError(f"ttt_length must be at least 1, got {self.ttt_length}")
        check_taps(self.target_layer_ids, self.num_target_layers, lowest=0)
        check_draft_vocab(self.draft_vocab_size, self.backbone.vocab_size)

    def check_target(self, target: TargetConfig) -> None:
        """Raises `ValueError` unless it was made for a target of this architecture."""
        check_same_target(self.backbone, self.num_target_layers, target)


class Eagle3Layer(nnx.Module):
    """The layer: attention reads embedding and feature side by side."""

    def __init__(
        self, config: DenseConfig, *, norm_before_residual: bool, dtype, rngs: nnx.Rngs
    ):
        D, eps = config.hidden_size, config.rms_norm_eps
        self.norm_before_residual = norm_before_residual
        self.input_layernorm = RMSNorm(D, eps=eps, dtype=dtype)
        self.hidden_norm = RMSNorm(D, eps=eps, dtype=dtype)
        self.self_attn = Attention(config, d_in=2 * D, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(D, eps=eps, dtype=dtype)
        self.mlp = GatedMLP(
            D, config.intermediate_size, bias=config.mlp_bias, dtype=dtype, rngs=rngs
        )

    def pair(
        self, embedded_TD: Float[Array, "T D"], feature_TD: Float[Array, "T D"]
    ) -> Float[Array, "T I"]:
        """What attention reads, I = 2 D."""
        normed = (self.input_layernorm(embedded_TD), self.hidden_norm(feature_TD))
        return jnp.concatenate(normed, axis=-1)

    def after_attention(
        self, feature_TD: Float[Array, "T D"], attended_TD: Float[Array, "T D"]
    ) -> Float[Array, "T D"]:
        """The rest of the layer; the residual is the feature's."""
        if self.norm_before_residual:
            feature_TD = self.hidden_norm(feature_TD)
        x_TD = feature_TD + attended_TD
        with jax.named_scope("mlp"):
            return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Eagle3Cache:
    """Context by position.

    Attributes:
      pairs: keys and values of the pairs (f_i, x_{i+1}).
      features: f_i of processed positions; they may be padded as in `LayerCache`.
    """

    pairs: LayerCache
    features: LayerRows


class Eagle3Drafter(nnx.Module):
    """Parameters of an Eagle3 drafter; paths are DeepSpec's tensor names."""

    may_skip: ClassVar[bool] = False
    lookahead: ClassVar[int] = 1
    in_one_pass: ClassVar[bool] = False

    def __init__(self, config: Eagle3Config, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        c = config.backbone
        D = c.hidden_size
        d_in, eps = len(config.target_layer_ids) * D, c.rms_norm_eps
        self.input_norm = (
            RMSNorm(d_in, eps=eps, dtype=dtype) if config.norm_before_fc else None
        )
        self.fc = Linear(d_in, D, dtype=dtype, rngs=rngs)
        layer = Eagle3Layer(
            c, norm_before_residual=config.norm_before_residual, dtype=dtype, rngs=rngs
        )
        self.layers = nnx.List([layer])
        self.norm = RMSNorm(D, eps=eps, dtype=dtype)
        pruned = config.draft_vocab_size
        self.lm_head = Linear(D, pruned, dtype=dtype, rngs=rngs) if pruned else None
        self.draft_ids = Buffer(jnp.arange(pruned, dtype=jnp.int32)) if pruned else None

    @property
    def block_length(self) -> int:
        """Most tokens it can propose at once."""
        return self.config.ttt_length

    @property
    def taps(self) -> tuple[int, ...]:
        """The embedding and the target layers of the features."""
        return (-1, *self.config.target_layer_ids)

    @property
    def dtype(self):
        """Type of parameters, activations and caches."""
        return self.fc.weight.dtype

    def check_target(self, target: TargetConfig) -> None:
        """See `Eagle3Config.check_target`."""
        self.config.check_target(target)

    def init_cache(self, slots: int, length: int) -> Eagle3Cache:
        """Empty pairs and features."""
        c = self.config.backbone
        size = (slots, c.num_key_value_heads, length, c.head_dim, self.dtype)
        return Eagle3Cache(
            pairs=LayerCache.zeros(*size),
            features=LayerRows.zeros(
                1, slots, length, padded_width(c.hidden_size), self.dtype
            ),
        )

    def features(self, taps_TmD: Float[Array, "T m D"]) -> Float[Array, "T D"]:
        """f_i of the layers' outputs (without the embedding)."""
        features_TX = taps_TmD.reshape(len(taps_TmD), -1)
        if self.input_norm is not None:
            features_TX = self.input_norm(features_TX)
        return self.fc(features_TX)

    def output(
        self, feature_TD: Float[Array, "T D"]
    ) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
        """What the head reads of the layer's output, and what the next draft does."""
        normed_TD = self.norm(feature_TD)
        return normed_TD, normed_TD if self.config.norm_output else feature_TD

    def rotation(self, positions_T: Int[Array, " T"]) -> Rotation:
        """Angles at the features' positions."""
        c = self.config.backbone
        return Rotation.at(c.rope, c.head_dim, positions_T)

    def observe(
        self, cache: Eagle3Cache, taps_TmD: Float[Array, "T m D"], tokens: FlatTokens
    ) -> Eagle3Cache:
        """Keeps features; writes the pair that each processed token completes."""
        taps_TmD = taps_TmD.astype(self.dtype)
        own_TD = self.features(taps_TmD[:, 1:])
        before_BD = self.features_before(cache, tokens.starts_B, tokens.pages_BP)
        before_BD, features = jax.lax.optimization_barrier((before_BD, cache.features))
        features = features.put(
            jnp.int32(0),
            tokens.slots_T,
            tokens.positions_T,
            pad_heads(own_TD, features.rows_LBSH.shape[-1]),
            tokens.slots_T >= 0,
            tokens.pages_BP,
        )
        around_BQD = jnp.concatenate(
            [before_BD[:, None], tokens.padded(own_TD, 0)], axis=1
        )
        feature_TD = tokens.flat(around_BQD[:, :-1])
        before = pairs_before(tokens)
        layer = self.layers[0]
        pairs = layer.self_attn.update_cache(
            layer.pair(taps_TmD[:, 0], feature_TD),
            cache.pairs,
            before,
            self.rotation(before.positions_T),
        )
        return Eagle3Cache(pairs=pairs, features=features)

    def features_before(
        self,
        cache: Eagle3Cache,
        starts_B: Int[Array, " B"],
        pages_BP: Int[Array, "B P"] | None,
    ) -> Float[Array, "B D"]:
        """f of the position before each of `starts_B`; anything before position 0."""
        table = cache.features.table(jnp.int32(0), pages_BP)
        newest_B1 = jnp.maximum(starts_B - 1, 0)[:, None]
        return table.take(newest_B1)[:, 0, : self.config.backbone.hidden_size]

    def propose(
        self,
        target: TargetModel,
        cache: Eagle3Cache,
        context: DraftContext,
        sampler: DraftSampler,
        block_length: int,
    ) -> tuple[Proposal, Eagle3Cache]:
        """Drafts token by token; each step writes its pair and reads all before it."""
        positions_B = context.positions_B
        B = len(positions_B)
        layer = self.layers[0]
        head_WD = target.head_VD if self.lm_head is None else self.lm_head.weight[...]
        # A slot that holds its anchor alone has no feature yet: its first pair stands
        # at place 0, where the anchor's own will be.
        newest_B = jnp.maximum(positions_B - 1, 0)
        rows_BD = self.features_before(cache, positions_B, context.pages_BP)
        feature_BD = jnp.where((positions_B > 0)[:, None], rows_BD, 0)

        def step(carry, previous_B, j, _):
            feature_BD, pairs = carry
            place_B = newest_B + j
            tokens = FlatTokens.from_rows(
                previous_B[:, None],
                place_B,
                jnp.ones((B,), jnp.int32),
                pages_BP=context.pages_BP,
            )
            embedded_BD = target.embed(previous_B).astype(self.dtype)
            attended_BD, pairs = layer.self_attn(
                layer.pair(embedded_BD, feature_BD),
                pairs,
                tokens,
                self.rotation(place_B),
            )
            hidden_BD, feature_BD = self.output(
                layer.after_attention(feature_BD, attended_BD)
            )
            return (feature_BD, pairs), head_logits(hidden_BD, head_WD), None

        proposal, (_, pairs) = draft_block(
            step,
            (feature_BD, cache.pairs),
            (),
            context,
            sampler,
            block_length,
            ids_W=None if self.draft_ids is None else self.draft_ids[...],
        )
        return proposal, replace(cache, pairs=pairs)
