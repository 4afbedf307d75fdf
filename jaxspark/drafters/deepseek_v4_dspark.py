"""DSpark as DeepSeek-V4's checkpoints carry it (`mtp.*`; arXiv 2607.05147, section 4).

    c_s = norm(W_main [h_s^(t1); ...; h_s^(tm)])     means over the target's streams
    block = stages([x_a, noise, ..., noise])         G rows at positions a, a+1, ...
    q_j = softmax(head(norm(h_j)) + W2 W1[x_j])      left to right; x_{j+1} ~ q_j
    k_j = w [h_j; W1[x_j]]                           confidence, h_j before the norm

A stage is a layer of the target's kind (hyper-connections, experts) with a window and
no compressed entries. All stages share c_s, and each makes its own keys of it, which
stay in a ring; a block sees the last W of them and all of its own rows. Nothing of a
block is kept.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxspark.drafters.base import DraftContext, DraftSampler, Proposal
from jaxspark.drafters.block_logits import BlockLogits
from jaxspark.drafters.dspark import check_taps
from jaxspark.drafters.heads import ConfidenceHead, MarkovHead
from jaxspark.drafters.sequential import draft_block
from jaxspark.models.base import TargetModel
from jaxspark.models.batch import FlatTokens
from jaxspark.models.deepseek_v4 import (
    DeepSeekV4Layer,
    ForwardContext,
    select_layer,
    stack_layers,
)
from jaxspark.models.deepseek_v4_config import DeepSeekV4Config
from jaxspark.models.layers.hyper_connections import HyperHead
from jaxspark.models.layers.linear import Linear, head_logits
from jaxspark.models.layers.norm import Float32RMSNorm
from jaxspark.models.layers.sparse_attention import AttentionInputs
from jaxspark.models.rows import Ring


@dataclass(frozen=True, kw_only=True)
class DeepSeekV4DSparkConfig:
    """The drafter inside a DeepSeek-V4 checkpoint, under its configuration's names.

    Attributes:
      target: architecture of the target, which the stages share.
      dspark_block_size: G, most tokens drafted at once.
      dspark_target_layer_ids: taps, ascending 0-based target layers.
      dspark_noise_token_id: token that fills the block after the anchor.
      dspark_markov_rank: R of the sequential head.
      n_mtp_layers: stages.
    """

    target: DeepSeekV4Config
    dspark_block_size: int
    dspark_target_layer_ids: tuple[int, ...]
    dspark_noise_token_id: int
    dspark_markov_rank: int
    n_mtp_layers: int = 3

    def __post_init__(self):
        if self.dspark_block_size < 1 or self.n_mtp_layers < 1:
            raise ValueError(
                "a drafter has at least one stage and one row, got "
                f"n_mtp_layers {self.n_mtp_layers} and dspark_block_size "
                f"{self.dspark_block_size}"
            )
        if self.dspark_block_size > self.target.sliding_window:
            raise ValueError(
                f"dspark_block_size {self.dspark_block_size} is longer than the window "
                f"of {self.target.sliding_window}, which all its rows look through"
            )
        depth = self.target.num_hidden_layers
        check_taps(self.dspark_target_layer_ids, depth, lowest=0)
        if not 0 <= self.dspark_noise_token_id < self.target.vocab_size:
            raise ValueError(
                f"dspark_noise_token_id {self.dspark_noise_token_id} lies outside the "
                f"vocabulary of {self.target.vocab_size}"
            )


class DeepSeekV4DSpark(nnx.Module):
    """Parameters of the drafter; inside a stage, the names are the target's."""

    may_skip: ClassVar[bool] = False
    lookahead: ClassVar[int] = 0
    in_one_pass: ClassVar[bool] = True

    def __init__(
        self, config: DeepSeekV4DSparkConfig, *, dtype=jnp.float32, rngs: nnx.Rngs
    ):
        self.config = config
        c, R = config.target, config.dspark_markov_rank
        D, options = c.hidden_size, {"dtype": dtype, "rngs": rngs}
        norm = partial(Float32RMSNorm, D, eps=c.rms_norm_eps, dtype=dtype)
        self.main_proj = Linear(len(self.taps) * D, D, **options)
        self.main_norm = norm()
        self.stages = stack_layers(
            partial(DeepSeekV4Layer, c, 0, False, dtype=dtype),
            config.n_mtp_layers,
            rngs,
        )
        self.hc_head = HyperHead(c, rngs=rngs)
        self.norm = norm()
        self.markov_head = MarkovHead(
            "vanilla",
            vocab=c.vocab_size,
            draft_vocab=c.vocab_size,
            width=D,
            rank=R,
            **options,
        )
        self.confidence_head = ConfidenceHead(D + R, bias=False, **options)

    @property
    def block_length(self) -> int:
        """Most tokens it can propose at once."""
        return self.config.dspark_block_size

    @property
    def taps(self) -> tuple[int, ...]:
        """Target layers that `observe` needs."""
        return self.config.dspark_target_layer_ids

    @property
    def dtype(self):
        """Type of activations and caches."""
        return self.main_proj.weight.dtype

    def check_target(self, target: DeepSeekV4Config) -> None:
        """Raises `ValueError` if it was made for another target."""
        if target != self.config.target:
            raise ValueError(
                "the drafter was made for another target: its configuration is "
                f"{self.config.target}, the target's is {target}"
            )

    def init_cache(self, slots: int, length: int) -> Ring:
        """Empty rings of context keys, one per stage."""
        c = self.config.target
        return Ring.empty(
            self.config.n_mtp_layers,
            slots,
            length,
            c.head_dim,
            self.dtype,
            lookback=c.sliding_window,
        )

    def observe(
        self, cache: Ring, taps_TmD: Float[Array, "T m D"], tokens: FlatTokens
    ) -> Ring:
        """Writes every stage's keys of the context features c_s."""
        angles = ForwardContext.of(self.config.target, tokens).plain
        features_TX = taps_TmD.astype(self.dtype).reshape(len(taps_TmD), -1)
        context_TD = self.main_norm(self.main_proj(features_TX))

        def step(cache, place):
            stage = select_layer(self.stages, place)
            keys_TH = stage.self_attn.keys(context_TD, angles)
            return cache.append(place, keys_TH, tokens), None

        return jax.lax.scan(step, cache, jnp.arange(self.config.n_mtp_layers))[0]

    def backbone(
        self,
        target,
        cache: Ring,
        anchors_B: Int[Array, " B"],
        positions_B: Int[Array, " B"],
        block_length: int,
    ) -> Float[Array, "B G D"]:
        """Collapsed hidden states of a block's rows, before the last norm."""
        B, G = len(anchors_B), block_length
        noise_BQ = jnp.full((B, G - 1), self.config.dspark_noise_token_id, jnp.int32)
        tokens = FlatTokens.from_rows(
            jnp.concatenate([anchors_B[:, None], noise_BQ], axis=1),
            positions_B,
            jnp.full((B,), G),
        )
        angles = ForwardContext.of(self.config.target, tokens).plain
        window = self.config.target.sliding_window

        def attend(stage, place, h_TD):
            attention = stage.self_attn
            inputs = AttentionInputs(
                latent_TR=attention.q_a_norm(attention.q_a_proj(h_TD)),
                keys_TH=attention.keys(h_TD, angles),
                before=cache.before(place, positions_B, window),
                entries=None,
            )
            # All rows see the last W context rows, as far as there are some, and the
            # block.
            return attention.attend(inputs, tokens, angles, causal=False), None

        x_TD = target.embed(tokens.ids_T).astype(self.dtype)
        x_TMD = target.streams(x_TD)

        def step(x_TMD, place):
            stage = select_layer(self.stages, place)
            x_TMD, _, _ = stage.apply_sublayers(
                partial(attend, stage, place), x_TMD, place, tokens
            )
            return x_TMD, None

        stages = jnp.arange(self.config.n_mtp_layers)
        x_TMD, _ = jax.lax.scan(step, x_TMD, stages)
        return self.hc_head(x_TMD).reshape(B, G, -1)

    def propose(
        self,
        target: TargetModel,
        cache: Ring,
        context: DraftContext,
        sampler: DraftSampler,
        block_length: int,
    ) -> tuple[Proposal, Ring]:
        """Drafts a block: stages once, then the heads row by row."""
        hidden_BGD = self.backbone(
            target, cache, context.anchors_B, context.positions_B, block_length
        )
        hidden_GBD = jnp.moveaxis(hidden_BGD, 1, 0)
        base_GBV = head_logits(self.norm(hidden_GBD), target.head_VD)

        def step(carry, previous_B, _, hidden_BD):
            embedded_BR = self.markov_head.embed(previous_B)
            features_BI = jnp.concatenate([hidden_BD, embedded_BR], axis=1)
            return carry, embedded_BR, self.confidence_head(features_BI)

        proposal, _ = draft_block(
            *(step, (), hidden_GBD, context, sampler, block_length),
            logits=BlockLogits(base_GBV, self.markov_head.markov_w2.weight[...]),
        )
        return proposal, cache
