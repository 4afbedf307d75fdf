"""DSpark: a block-parallel backbone with a sequential head (arXiv 2607.05147).

    c_s = norm(W_fc [h_s^(t1); ...; h_s^(tm)])      one context row per position
    block = backbone([x_a, mask, ..., mask])        G rows, see c_0..c_{a-1} and block
    q_j = softmax(head(block_j) + b(x_j))           left to right; x_{j+1} ~ q_j

`observe` turns taps into context rows once and caches their keys and values per draft
layer. `propose` writes the block's own rows at positions a, a+1, ... of the same cache,
which are garbage until `observe` overwrites them, so a block row sees exactly the
cached positions below a + G: context and block in one attention call.

DFlash is the same backbone without sequential and confidence heads. Embedding and LM
head are the target's. A pruned draft vocabulary brings its own rows of the head.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxspark.drafters.base import DraftContext, DraftSampler, Proposal
from jaxspark.drafters.block_logits import BlockLogits
from jaxspark.drafters.heads import HEAD_TYPES, ConfidenceHead, MarkovHead
from jaxspark.drafters.sequential import draft_block
from jaxspark.models import (
    DenseConfig,
    FlatTokens,
    LayerCache,
    TargetConfig,
    TargetModel,
)
from jaxspark.models.dense import DecoderLayer
from jaxspark.models.layers.linear import Buffer, Linear, head_logits
from jaxspark.models.layers.norm import RMSNorm
from jaxspark.models.layers.rope import Rotation


@dataclass(frozen=True, kw_only=True)
class DSparkConfig:
    """A DSpark or DFlash drafter, under DeepSpec's names.

    Attributes:
      backbone: architecture of the draft layers; `num_hidden_layers` is the depth.
      block_size: G, most tokens drafted at once.
      target_layer_ids: taps, ascending 0-based target layers (-1: the embedding).
      mask_token_id: token that fills the block after the anchor.
      num_target_layers: depth of the target it was made for.
      markov_rank: R of the sequential head, 0 for none (DFlash).
      markov_head_type: "vanilla", "gated" or "rnn".
      enable_confidence_head: whether it predicts acceptance.
      confidence_head_with_markov: whether that prediction sees W1[x_j].
      draft_vocab_size: size of a pruned draft vocabulary; None for the target's.
      sample_from_anchor: row j predicts position a+1+j (DSpark). False: a mask row
        predicts its own position, one more row per block (DFlash as first published).
    """

    backbone: DenseConfig
    block_size: int
    target_layer_ids: tuple[int, ...]
    mask_token_id: int
    num_target_layers: int
    markov_rank: int = 0
    markov_head_type: str = "vanilla"
    enable_confidence_head: bool = False
    confidence_head_with_markov: bool = False
    draft_vocab_size: int | None = None
    sample_from_anchor: bool = True

    def __post_init__(self):
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")
        check_taps(self.target_layer_ids, self.num_target_layers, lowest=-1)
        check_draft_vocab(self.draft_vocab_size, self.backbone.vocab_size)
        if self.markov_head_type not in HEAD_TYPES:
            raise ValueError(
                f"unknown markov_head_type {self.markov_head_type!r}; "
                f"expected one of {HEAD_TYPES}"
            )
        if self.confidence_head_with_markov and not self.markov_rank:
            raise ValueError("confidence_head_with_markov needs markov_rank > 0")
        if not 0 <= self.mask_token_id < self.backbone.vocab_size:
            raise ValueError(
                f"mask_token_id {self.mask_token_id} lies outside the vocabulary of "
                f"{self.backbone.vocab_size}"
            )

    def check_target(self, target: TargetConfig) -> None:
        """Whether it was made for a target of this architecture.

        Raises:
          ValueError: width, vocabulary or depth differ; names both.
        """
        check_same_target(self.backbone, self.num_target_layers, target)


def check_taps(taps: tuple[int, ...], num_target_layers: int, *, lowest: int) -> None:
    """Raises `ValueError` unless taps ascend within `lowest` and the last layer."""
    if not taps or any(a >= b for a, b in zip(taps, taps[1:])):
        raise ValueError(f"target_layer_ids must be ascending, got {taps}")
    last = num_target_layers - 1
    if taps[0] < lowest or taps[-1] > last:
        raise ValueError(
            f"target_layer_ids {taps} must lie in {lowest}..{last}, the layers of a "
            f"target of depth {num_target_layers}"
        )


def check_draft_vocab(size: int | None, vocab_size: int) -> None:
    """Raises `ValueError` if a pruned vocabulary is empty or larger than the whole."""
    if size is not None and not 1 <= size <= vocab_size:
        raise ValueError(f"draft_vocab_size must lie in 1..{vocab_size}, got {size}")


def check_same_target(
    backbone: DenseConfig, num_target_layers: int, target: TargetConfig
) -> None:
    """Raises `ValueError` if width, vocabulary or depth are another target's."""
    for name, mine, theirs in (
        ("hidden_size", backbone.hidden_size, target.hidden_size),
        ("vocab_size", backbone.vocab_size, target.vocab_size),
        ("num_target_layers", num_target_layers, target.num_hidden_layers),
    ):
        if mine != theirs:
            raise ValueError(
                f"the drafter was made for another target: {name} is {mine}, "
                f"the target's is {theirs}"
            )


class DSparkDrafter(nnx.Module):
    """Parameters of a DSpark or DFlash drafter; paths are DeepSpec's tensor names."""

    may_skip: ClassVar[bool] = False
    lookahead: ClassVar[int] = 0
    in_one_pass: ClassVar[bool] = True

    def __init__(self, config: DSparkConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        c = config.backbone
        D, eps = c.hidden_size, c.rms_norm_eps
        options = {"dtype": dtype, "rngs": rngs}
        self.fc = Linear(len(config.target_layer_ids) * D, D, **options)
        self.hidden_norm = RMSNorm(D, eps=eps, dtype=dtype)
        self.layers = nnx.List(
            DecoderLayer(c, **options) for _ in range(c.num_hidden_layers)
        )
        self.norm = RMSNorm(D, eps=eps, dtype=dtype)
        pruned = config.draft_vocab_size
        self.markov_head = (
            MarkovHead(
                config.markov_head_type,
                vocab=c.vocab_size,
                draft_vocab=pruned or c.vocab_size,
                width=D,
                rank=config.markov_rank,
                **options,
            )
            if config.markov_rank
            else None
        )
        with_markov = config.markov_rank * config.confidence_head_with_markov
        self.confidence_head = (
            ConfidenceHead(D + with_markov, **options)
            if config.enable_confidence_head
            else None
        )
        self.lm_head = Linear(D, pruned, **options) if pruned else None
        self.draft_ids = Buffer(jnp.arange(pruned, dtype=jnp.int32)) if pruned else None

    @property
    def block_length(self) -> int:
        """Most tokens it can propose at once."""
        return self.config.block_size

    @property
    def taps(self) -> tuple[int, ...]:
        """Target layers that `observe` needs."""
        return self.config.target_layer_ids

    @property
    def dtype(self):
        """Type of parameters, activations and caches."""
        return self.fc.weight.dtype

    def check_target(self, target: TargetConfig) -> None:
        """See `DSparkConfig.check_target`."""
        self.config.check_target(target)

    def init_cache(self, slots: int, length: int) -> tuple[LayerCache, ...]:
        """Empty context rows, one cache per draft layer."""
        c = self.config.backbone
        size = (slots, c.num_key_value_heads, length, c.head_dim, self.dtype)
        return tuple(LayerCache.zeros(*size) for _ in self.layers)

    def _rotation(self, tokens: FlatTokens) -> Rotation:
        c = self.config.backbone
        return Rotation.at(c.rope, c.head_dim, tokens.positions_T)

    def observe(
        self,
        cache: tuple[LayerCache, ...],
        taps_TmD: Float[Array, "T m D"],
        tokens: FlatTokens,
    ) -> tuple[LayerCache, ...]:
        """Writes keys and values of the context features c_s of processed tokens."""
        rotation = self._rotation(tokens)
        context_TD = self.context(taps_TmD.astype(self.dtype))
        return tuple(
            layer.self_attn.update_cache(context_TD, layer_cache, tokens, rotation)
            for layer, layer_cache in zip(self.layers, cache)
        )

    def context(self, taps_TmD: Float[Array, "T m D"]) -> Float[Array, "T D"]:
        """The context features c_s, which every draft layer sees."""
        return self.hidden_norm(self.fc(taps_TmD.reshape(len(taps_TmD), -1)))

    def backbone(
        self,
        target,
        cache: tuple[LayerCache, ...],
        anchors_B: Int[Array, " B"],
        positions_B: Int[Array, " B"],
        block_length: int,
        pages_BP: Int[Array, "B P"] | None = None,
    ) -> tuple[Float[Array, "B G D"], tuple[LayerCache, ...]]:
        """Normed hidden states of a block's predicting rows, and the written cache."""
        B = anchors_B.shape[0]
        rows = block_length + (not self.config.sample_from_anchor)
        masks_BQ = jnp.full((B, rows - 1), self.config.mask_token_id, jnp.int32)
        tokens = FlatTokens.from_rows(
            jnp.concatenate([anchors_B[:, None], masks_BQ], axis=1),
            positions_B,
            jnp.full((B,), rows),
            limits_B=positions_B + rows,
            pages_BP=pages_BP,
        )
        rotation = self._rotation(tokens)
        x_TD = target.embed(tokens.ids_T).astype(self.dtype)
        written = []
        for layer, layer_cache in zip(self.layers, cache):
            x_TD, layer_cache = layer(x_TD, layer_cache, tokens, rotation)
            written.append(layer_cache)
        hidden_BQD = self.norm(x_TD).reshape(B, rows, -1)
        return hidden_BQD[:, rows - block_length :], tuple(written)

    def logits(self, target, hidden_BGD) -> Float[Array, "B G W"]:
        """Base logits u_j of all rows over the draft vocabulary."""
        own = self.lm_head
        head_WD = target.head_VD if own is None else own.weight[...]
        return head_logits(hidden_BGD, head_WD)

    def propose(
        self,
        target: TargetModel,
        cache: tuple[LayerCache, ...],
        context: DraftContext,
        sampler: DraftSampler,
        block_length: int,
    ) -> tuple[Proposal, tuple[LayerCache, ...]]:
        """Drafts a block: backbone once, then the heads row by row."""
        hidden_BGD, cache = self.backbone(
            *(target, cache, context.anchors_B, context.positions_B, block_length),
            pages_BP=context.pages_BP,
        )
        hidden_GBD = jnp.moveaxis(hidden_BGD, 1, 0)
        base_GBW, head = self.logits(target, hidden_GBD), self.markov_head

        def step(state_BR, previous_B, j, hidden_BD):
            state_BR, latent_BR, confidence_B = self.step(
                state_BR, previous_B, hidden_BD
            )
            given = base_GBW[j] if latent_BR is None else latent_BR
            if self.confidence_head is None:
                confidence_B = None
            return state_BR, given, confidence_B

        proposal, _ = draft_block(
            step,
            () if head is None else head.start(len(context.lengths_B)),
            hidden_GBD,
            context,
            sampler,
            block_length,
            ids_W=None if self.draft_ids is None else self.draft_ids[...],
            logits=None
            if head is None
            else BlockLogits(base_GBW, head.markov_w2.weight[...]),
        )
        return proposal, cache

    def step(self, state_BR, previous_B, hidden_BD):
        """Row j: next head state, latent of its bias [B, R], confidence logit [B].

        Without a sequential head the latent is None, without a confidence head the
        logit is 0 (probability one half).
        """
        features_BI, latent_BR = hidden_BD, None
        if self.markov_head is not None:
            embedded_BR = self.markov_head.embed(previous_B)
            state_BR, latent_BR = self.markov_head.latent(
                state_BR, embedded_BR, hidden_BD
            )
            if self.config.confidence_head_with_markov:
                features_BI = jnp.concatenate([hidden_BD, embedded_BR], axis=1)
        if self.confidence_head is None:
            confidence_B = jnp.zeros(previous_B.shape, jnp.float32)
        else:
            confidence_B = self.confidence_head(features_BI)
        return state_BR, latent_BR, confidence_B
