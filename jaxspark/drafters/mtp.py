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
    DeepSeekV4Config,
    DeepSeekV4Layer,
    Pass,
    member,
    stacked,
)
from jaxspark.models.layers.experts import Routing
from jaxspark.models.layers.hyper_connections import HyperHead
from jaxspark.models.layers.linear import Linear, row_product
from jaxspark.models.layers.norm import Float32RMSNorm
from jaxspark.models.layers.sparse_attention import SparseCache
from jaxspark.models.rows import Rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MTPCache:
    """Context by position.

    Attributes:
      pairs: the layer's window.
      streams: ring of the target's streams h_i, side by side.
    """

    pairs: SparseCache
    streams: Rows


class MTPDrafter(nnx.Module):
    """Parameters of the module; names are those of the released `mtp.0.`."""

    abstains: ClassVar[bool] = False

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
        self.stages = stacked(
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
            streams=Rows.ring(
                1, slots, length, c.hc_mult * c.hidden_size, self.dtype, lookback=1
            ),
        )

    def pair(
        self, embedded_DT: Float[Array, "D T"], streams_MDT: Float[Array, "M D T"]
    ) -> Float[Array, "M D T"]:
        """The layer's input, on every stream."""
        e_DT = self.e_proj(self.enorm(embedded_DT))
        h_MDT = jax.vmap(lambda h_DT: self.h_proj(self.hnorm(h_DT)))(streams_MDT)
        return e_DT + h_MDT

    def of_whole(
        self,
        target,
        streams_MDT: Float[Array, "M D T"],
        next_T: Int[Array, " T"],
        tokens: FlatTokens,
    ) -> tuple[Float[Array, "T V"], Routing]:
        """Logits of the token after the next one, for texts that begin with this pass.

        Args:
          target: whose embedding and head it uses.
          streams_MDT: after the target's last layer.
          next_T: the token after each one; anything for a text's last.
          tokens: the texts.

        Returns:
          The logits, and where its experts were chosen.
        """
        run, stage = Pass.of(self.config, tokens), member(self.stages, jnp.int32(0))

        def attend(h_DT):
            return stage.self_attn.of_whole(h_DT, tokens, run.view, run.plain)

        x_MDT = self.pair(target.embed(next_T).astype(self.dtype), streams_MDT)
        x_MDT, _, routing = stage.around(attend, x_MDT, jnp.int32(0), tokens)
        logits_TV = row_product(target.head_VD, self.norm(self.hc_head(x_MDT)))
        return logits_TV, routing

    def observe(
        self, cache: MTPCache, taps_mDT: Float[Array, "m D T"], tokens: FlatTokens
    ) -> MTPCache:
        """Keeps streams; writes the pair that each processed token completes."""
        taps_mDT = taps_mDT.astype(self.dtype)
        view, zero, T = tokens.view(), jnp.int32(0), taps_mDT.shape[-1]
        rows_TX = taps_mDT[1:].reshape(-1, T).T
        newest_B1X, streams = cache.streams.advance(zero, 1, rows_TX, tokens, view)
        around_BQX = jnp.concatenate([newest_B1X, view.spread(rows_TX, 0)], axis=1)
        previous_TX = view.collect(around_BQX[:, :-1])
        before = pairs_before(tokens)
        x_MDT = self.pair(taps_mDT[0], previous_TX.T.reshape(taps_mDT[1:].shape))
        run, stage = Pass.of(self.config, before), member(self.stages, zero)
        h_DT, _, _ = stage.attn_hc(x_MDT)
        keys_TH = stage.self_attn.keys(stage.input_layernorm(h_DT), run.plain)
        window = cache.pairs.window.append(zero, keys_TH, before, run.view)
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
        stage = member(self.stages, zero)

        def step(carry, previous_B, j, _):
            streams_MDB, pairs = carry
            tokens = FlatTokens.from_rows(
                previous_B[:, None], first_B + j, jnp.ones((B,), jnp.int32)
            )
            embedded_DB = target.embed(previous_B).astype(self.dtype)
            x_MDB = self.pair(embedded_DB, streams_MDB)
            x_MDB, pairs = stage(x_MDB, pairs, zero, Pass.of(self.config, tokens))
            normed_DB = self.norm(self.hc_head(x_MDB))
            return (x_MDB, pairs), row_product(target.head_VD, normed_DB), None

        start = (newest_BX.T.reshape(M, D, B), cache.pairs)
        proposal, (_, pairs) = draft_block(
            step, start, (), context, sampler, block_length
        )
        return proposal, MTPCache(pairs, cache.streams)
