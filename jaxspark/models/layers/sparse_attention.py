"""DeepSeek-V4's attention: a sliding window beside compressed entries (section 2.3).

    q = rope(norm_head(W_qb norm(W_qa x)))     N heads, their norm has no weight
    k = v = rope(norm(W_kv x))                 one head that all queries share
    o = softmax over [window | entries | sink] times v
    y = W_ob blockdiag(W_oa) rope^-1(o)

Layers differ in their entries: none, CSA (every 4 positions, chosen by an indexer) or
HCA (every 128, all of them). Keys are values too, so values carry the rotation of their
positions; turned back by the query's, what is read depends on distances alone.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxspark.models.batch import FlatTokens, SlotView
from jaxspark.models.layers.compression import Compressor
from jaxspark.models.layers.indexer import Indexer
from jaxspark.models.layers.linear import Linear, product
from jaxspark.models.layers.norm import Float32RMSNorm, normalise
from jaxspark.models.layers.rope import TrailingRotation
from jaxspark.models.rows import Rows
from pallas_kernels import sparse_attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseCache:
    """What the layers of one kind remember.

    Attributes:
      window: ring of the newest keys.
      raw: ring of rows that await compression; None for layers without entries.
      entries: compressed entries.
      index_raw, index_keys: the indexer's; None for layers without one.
    """

    window: Rows
    raw: Rows | None = None
    entries: Rows | None = None
    index_raw: Rows | None = None
    index_keys: Rows | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Looked:
    """What attention over whole texts looked at, see `sparse_attention`.

    Attributes:
      latent_RT: of the queries.
      recent_BRH, spans_BQ2, seen: rows and entries.
      scores_BQC: of the indexer; None for layers without one.
    """

    latent_RT: Float[Array, "R T"]
    recent_BRH: Float[Array, "B R H"]
    spans_BQ2: Int[Array, "B Q 2"]
    seen: dict
    scores_BQC: Float[Array, "B Q C"] | None


class SparseAttention(nnx.Module):
    """Attention of N heads of width H over shared keys; `ratio` 0 has no entries."""

    def __init__(self, config, ratio: int, *, dtype, rngs: nnx.Rngs):
        D, N, H = config.hidden_size, config.num_attention_heads, config.head_dim
        R, eps, options = config.q_lora_rank, config.rms_norm_eps, {"dtype": dtype}
        groups = config.o_groups
        self.q_a_proj = Linear(D, R, **options, rngs=rngs)
        self.q_a_norm = Float32RMSNorm(R, eps=eps, **options)
        self.q_b_proj = Linear(R, N * H, **options, rngs=rngs)
        self.kv_proj = Linear(D, H, **options, rngs=rngs)
        self.kv_norm = Float32RMSNorm(H, eps=eps, **options)
        self.o_a_proj = Linear(
            N * H // groups, groups * config.o_lora_rank, **options, rngs=rngs
        )
        self.o_b_proj = Linear(groups * config.o_lora_rank, D, **options, rngs=rngs)
        self.sinks = nnx.Param(jnp.zeros((N,), jnp.float32))
        overlap = ratio == config.csa_ratio
        self.compressor = (
            Compressor(config, H, ratio, overlap=overlap, **options, rngs=rngs)
            if ratio
            else None
        )
        self.indexer = Indexer(config, **options, rngs=rngs) if overlap else None
        self.heads, self.head_dim, self.groups, self.eps = N, H, groups, eps
        self.window = config.sliding_window

    def init_cache(self, layers: int, slots: int, length: int, dtype) -> SparseCache:
        """Empty caches of `layers` such layers for sequences of `length` positions."""
        size = (layers, slots, length)
        window = Rows.ring(*size, self.head_dim, dtype, lookback=self.window - 1)
        if self.compressor is None:
            return SparseCache(window)
        raw = self.compressor.init_raw(*size)
        entries = self.compressor.init_entries(*size, dtype)
        if self.indexer is None:
            return SparseCache(window, raw, entries)
        index = self.indexer.compressor
        return SparseCache(
            window,
            raw,
            entries,
            index.init_raw(*size),
            index.init_entries(*size, dtype),
        )

    def __call__(
        self,
        x_DT: Float[Array, "D T"],
        cache: SparseCache,
        layer: Int[Array, ""],
        tokens: FlatTokens,
        view: SlotView,
        rotation: TrailingRotation,
    ) -> tuple[Float[Array, "D T"], SparseCache]:
        """Each token attends to its slot's window and entries; writes all caches."""
        rows_TH = self.keys(x_DT, rotation)
        before_BWH, window = cache.window.advance(
            layer, self.window - 1, rows_TH, tokens, view
        )
        recent_BRH = jnp.concatenate([before_BWH, view.spread(rows_TH, 0)], axis=1)
        cache = dataclasses.replace(cache, window=window)

        spans_BQ2 = self._spans(tokens)
        latent_RT = self.q_a_norm(self.q_a_proj(x_DT))
        cache, seen = self.compressed(
            x_DT, latent_RT, cache, layer, tokens, view, rotation
        )
        o_DT = self.attend(latent_RT, recent_BRH, spans_BQ2, seen, view, rotation)
        return o_DT, cache

    def of_whole(
        self,
        x_DT: Float[Array, "D T"],
        tokens: FlatTokens,
        view: SlotView,
        rotation: TrailingRotation,
    ) -> tuple[Float[Array, "D T"], "Looked"]:
        """The same for texts that begin with this pass, without any cache.

        The indexer learns from what attention does and not the other way round, so no
        gradient flows from it into its inputs.

        Returns:
          The output, and what was looked at, for the indexer's loss.
        """
        rows_TH = self.keys(x_DT, rotation)
        lookback = self.window - 1
        before_BWH = jnp.zeros((tokens.slots, lookback, self.head_dim), rows_TH.dtype)
        recent_BRH = jnp.concatenate([before_BWH, view.spread(rows_TH, 0)], axis=1)
        spans_BQ2 = self._spans(tokens)
        latent_RT = self.q_a_norm(self.q_a_proj(x_DT))
        seen, scores_BQC = {}, None
        if self.compressor is not None:
            entries_BCH = self.compressor.of_whole(x_DT, tokens, view)
            seen["entries_LBCH"] = entries_BCH[None].astype(x_DT.dtype)
            positions_BQ = tokens.starts_B[:, None] + jnp.arange(tokens.rows)
            limits_BQ = self.compressor.limits(positions_BQ)
            if self.indexer is None:
                seen["limits_BQ"] = limits_BQ
            else:
                stop = jax.lax.stop_gradient
                keys_BCH = self.indexer.compressor.of_whole(stop(x_DT), tokens, view)
                scores_BQC = self.indexer.scores(
                    stop(x_DT),
                    stop(latent_RT),
                    keys_BCH.astype(x_DT.dtype),
                    view,
                    rotation,
                )
                seen["chosen_BQX"] = self.indexer.choose(stop(scores_BQC), limits_BQ)
        o_DT = self.attend(latent_RT, recent_BRH, spans_BQ2, seen, view, rotation)
        return o_DT, Looked(latent_RT, recent_BRH, spans_BQ2, seen, scores_BQC)

    def keys(
        self, x_DT: Float[Array, "D T"], rotation: TrailingRotation
    ) -> Float[Array, "T H"]:
        """The shared keys, which are the values too."""
        return rotation(self.kv_norm(self.kv_proj(x_DT))[None])[0].T

    def _spans(self, tokens: FlatTokens) -> Int[Array, "B Q 2"]:
        """Rows each query sees, of those W - 1 before the pass and of its own.

        Row i lies at position start - (W - 1) + i. The query in row r sees W rows, r to
        r + W - 1, of which the last is its own, but none before position 0.
        """
        row_Q = jnp.arange(tokens.rows)
        oldest_BQ = jnp.maximum(row_Q, self.window - 1 - tokens.starts_B[:, None])
        newest_BQ = jnp.broadcast_to(row_Q + self.window, oldest_BQ.shape)
        return jnp.stack([oldest_BQ, newest_BQ], axis=-1)

    def compressed(
        self, x_DT, latent_RT, cache, layer, tokens, view, rotation
    ) -> tuple[SparseCache, dict]:
        """Brings entries up to date; which of them the queries see, as keywords."""
        if self.compressor is None:
            return cache, {}
        where = (layer, tokens, view)
        with jax.named_scope("compress"):
            raw, entries = self.compressor(x_DT, cache.raw, cache.entries, *where)
        cache = dataclasses.replace(cache, raw=raw, entries=entries)
        positions_BQ = tokens.starts_B[:, None] + jnp.arange(tokens.rows)
        limits_BQ = self.compressor.limits(positions_BQ)
        seen = {"entries_LBCH": entries.rows_LBSH, "layer": layer}
        if self.indexer is None:
            return cache, seen | {"limits_BQ": limits_BQ}
        with jax.named_scope("index"):
            raw, keys = self.indexer.compressor(
                x_DT, cache.index_raw, cache.index_keys, *where
            )
            cache = dataclasses.replace(cache, index_raw=raw, index_keys=keys)
            scores_BQC = self.indexer.scores(
                x_DT, latent_RT, keys.layer(layer), view, rotation
            )
            chosen_BQX = self.indexer.choose(scores_BQC, limits_BQ)
        return cache, seen | {"chosen_BQX": chosen_BQX}

    def queries(
        self, latent_RT: Float[Array, "R T"], rotation: TrailingRotation
    ) -> Float[Array, "T N H"]:
        """Queries, normed per head and rotated."""
        q_NHT = self.q_b_proj(latent_RT).reshape(self.heads, self.head_dim, -1)
        q_NHT = rotation(normalise(q_NHT, self.eps).astype(latent_RT.dtype))
        return jnp.moveaxis(q_NHT, -1, 0)

    def attend(
        self,
        latent_RT: Float[Array, "R T"],
        recent_BRH: Float[Array, "B R H"],
        spans_BQ2: Int[Array, "B Q 2"],
        seen: dict,
        view: SlotView,
        rotation: TrailingRotation,
    ) -> Float[Array, "D T"]:
        """Queries from their latent, attention, and the grouped output projection."""
        T = latent_RT.shape[1]
        with jax.named_scope("sparse_attention"):
            o_BQNH = sparse_attention(
                view.spread(self.queries(latent_RT, rotation), 0),
                recent_BRH,
                spans_BQ2,
                self.sinks[...],
                window=self.window,
                scale=self.head_dim**-0.5,
                **seen,
            )
        o_NHT = rotation.inverse(jnp.moveaxis(view.collect(o_BQNH), 0, -1))
        o_gIT = o_NHT.reshape(self.groups, -1, T)
        w_gRI = self.o_a_proj.matrix.reshape(self.groups, -1, o_gIT.shape[1])
        low_XT = jax.vmap(product)(w_gRI, o_gIT).reshape(-1, T)
        return self.o_b_proj(low_XT)
