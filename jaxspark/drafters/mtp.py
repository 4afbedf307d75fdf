"""Multi-token prediction, DeepSeek's own one-layer drafter (V3 report, section 2.2).

    pair_i = W_e norm(embed(x_{i+1})) + W_h norm(h_i)      on each residual stream
    h'_i = layer(pair_i)                                    sees pairs 0 .. i
    q = softmax(head(norm(collapse(h'_i))))                 predicts x_{i+2}

h_i are the target's streams after its last layer. A pair is complete when the token
after it is known, so `observe` writes the pair *before* each token it sees. Beyond one
token the layer is applied to its own output; the paper's baseline drafts one.
"""

from dataclasses import dataclass
from functools import partial
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
from jaxspark.drafters.sequential import draft_block
from jaxspark.models.base import TargetModel
from jaxspark.models.batch import FlatTokens
from jaxspark.models.deepseek_v4 import (
    DeepSeekV4Layer,
    ForwardContext,
    from_the_start,
    select_layer,
    stack_layers,
)
from jaxspark.models.deepseek_v4_config import DeepSeekV4Config
from jaxspark.models.layers.experts import Routing
from jaxspark.models.layers.hyper_connections import HyperHead
from jaxspark.models.layers.linear import Linear, head_logits
from jaxspark.models.layers.norm import Float32RMSNorm
from jaxspark.models.layers.sparse_attention import SparseCache
from jaxspark.models.rows import Ring


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MTPCache:
    """Context by position.

    Attributes:
      pairs: the layer's window.
      streams: ring of the target's streams h_i, side by side.
    """

    pairs: SparseCache
    streams: Ring


class MTPDrafter(nnx.Module):
    """Parameters of the module; names are those of the released `mtp.0.`."""

    may_skip: ClassVar[bool] = False
    lookahead: ClassVar[int] = 0
    in_one_pass: ClassVar[bool] = False

    def __init__(
        self,
        config: DeepSeekV4Config,
        *,
        block_length: int = 1,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Drafts for a target of this configuration, `block_length` tokens at most."""
        if block_length < 1:
            raise ValueError(f"block_length must be at least 1, got {block_length}")
        self.config, self._block_length = config, block_length
        D, options = config.hidden_size, {"dtype": dtype, "rngs": rngs}
        norm = partial(Float32RMSNorm, D, eps=config.rms_norm_eps, dtype=dtype)
        self.e_proj, self.h_proj = Linear(D, D, **options), Linear(D, D, **options)
        self.enorm, self.hnorm, self.norm = norm(), norm(), norm()
        self.stages = stack_layers(
            partial(DeepSeekV4Layer, config, 0, False, dtype=dtype), 1, rngs
        )
        self.hc_head = HyperHead(config, rngs=rngs)

    @property
    def block_length(self) -> int:
        """Most tokens it can propose at once."""
        return self._block_length

    @property
    def taps(self) -> tuple[int, ...]:
        """The embedding, and every stream after the target's last layer."""
        depth = self.config.num_hidden_layers
        return (-1, *range(depth, depth + self.config.hc_mult))

    @property
    def dtype(self):
        """Type of activations and caches."""
        return self.e_proj.weight.dtype

    def check_target(self, target: DeepSeekV4Config) -> None:
        """Raises `ValueError` if it was made for another target."""
        if target != self.config:
            raise ValueError(
                "the drafter was made for another target: its configuration is "
                f"{self.config}, the target's is {target}"
            )

    def init_cache(self, slots: int, length: int) -> MTPCache:
        """Empty rings."""
        c = self.config
        return MTPCache(
            pairs=self.stages.self_attn.init_cache(1, slots, length, self.dtype),
            streams=Ring.empty(
                1, slots, length, c.hc_mult * c.hidden_size, self.dtype, lookback=1
            ),
        )

    def pair(
        self, embedded_TD: Float[Array, "T D"], streams_TMD: Float[Array, "T M D"]
    ) -> Float[Array, "T M D"]:
        """The layer's input, on every stream."""
        e_TD = self.e_proj(self.enorm(embedded_TD))
        return e_TD[:, None] + self.h_proj(self.hnorm(streams_TMD))

    def logits(
        self,
        target,
        streams_TMD: Float[Array, "T M D"],
        next_T: Int[Array, " T"],
        tokens: FlatTokens,
    ) -> tuple[Float[Array, "T V"], Routing]:
        """Logits of the token after the next one, for texts that begin with this pass.

        Args:
          target: whose embedding and head it uses.
          streams_TMD: after the target's last layer.
          next_T: the token after each one; anything for a text's last.
          tokens: the texts.

        Returns:
          The logits, and where its experts were chosen.
        """
        context = ForwardContext.of(self.config, tokens)
        stage = select_layer(self.stages, jnp.int32(0))
        x_TMD = self.pair(target.embed(next_T).astype(self.dtype), streams_TMD)
        x_TMD, internals = from_the_start(stage, x_TMD, context)
        logits_TV = head_logits(self.norm(self.hc_head(x_TMD)), target.head_VD)
        return logits_TV, internals.routing

    def observe(
        self, cache: MTPCache, taps_TmD: Float[Array, "T m D"], tokens: FlatTokens
    ) -> MTPCache:
        """Keeps streams; writes the pair that each processed token completes."""
        taps_TmD = taps_TmD.astype(self.dtype)
        zero, T = jnp.int32(0), len(taps_TmD)
        rows_TX = taps_TmD[:, 1:].reshape(T, -1)
        newest_B1X, streams = cache.streams.advance(zero, 1, rows_TX, tokens)
        around_BQX = jnp.concatenate([newest_B1X, tokens.padded(rows_TX, 0)], axis=1)
        previous_TX = tokens.flat(around_BQX[:, :-1])
        before = pairs_before(tokens)
        x_TMD = self.pair(taps_TmD[:, 0], previous_TX.reshape(taps_TmD[:, 1:].shape))
        angles = ForwardContext.of(self.config, before).plain
        stage = select_layer(self.stages, zero)
        h_TD, _, _ = stage.attn_hc(x_TMD)
        keys_TH = stage.self_attn.keys(stage.input_layernorm(h_TD), angles)
        window = cache.pairs.window.append(zero, keys_TH, before)
        return MTPCache(SparseCache(window), streams)

    def propose(
        self,
        target: TargetModel,
        cache: MTPCache,
        context: DraftContext,
        sampler: DraftSampler,
        block_length: int,
    ) -> tuple[Proposal, MTPCache]:
        """Drafts token by token; each step writes its pair and reads those before."""
        positions_B = context.positions_B
        B, zero = len(positions_B), jnp.int32(0)
        M, D = self.config.hc_mult, self.config.hidden_size
        newest_BX = cache.streams.before(zero, positions_B, 1)[:, 0]
        # A slot that holds its anchor alone has no streams yet.
        newest_BX = jnp.where((positions_B > 0)[:, None], newest_BX, 0)
        first_B = jnp.maximum(positions_B - 1, 0)
        stage = select_layer(self.stages, zero)

        def step(carry, previous_B, j, _):
            streams_BMD, pairs = carry
            tokens = FlatTokens.from_rows(
                previous_B[:, None], first_B + j, jnp.ones((B,), jnp.int32)
            )
            embedded_BD = target.embed(previous_B).astype(self.dtype)
            x_BMD = self.pair(embedded_BD, streams_BMD)
            context = ForwardContext.of(self.config, tokens)
            x_BMD, pairs, _ = stage(x_BMD, pairs, zero, context)
            normed_BD = self.norm(self.hc_head(x_BMD))
            return (x_BMD, pairs), head_logits(normed_BD, target.head_VD), None

        start = (newest_BX.reshape(B, M, D), cache.pairs)
        proposal, (_, pairs) = draft_block(
            step, start, (), context, sampler, block_length
        )
        return proposal, MTPCache(pairs, cache.streams)
