"""DeepSeek-V4's attention: a sliding window beside compressed entries (section 2.3).

    q = rope(norm_head(W_qb norm(W_qa x)))     N heads, their norm has no weight
    k = v = rope(norm(W_kv x))                 one head that all queries share
    o = softmax over [window | entries | sink] times v
    y = W_ob blockdiag(W_oa) rope^-1(o)

Layers differ in their entries: none, CSA (every 4 positions, chosen by an indexer) or
HCA (every 128, all of them). Keys are values too, so values carry the rotation of their
positions; turned back by the query's, what is read depends on distances alone.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxspark.models.batch import FlatTokens
from jaxspark.models.layers.compression import Compressor
from jaxspark.models.layers.indexer import Indexer
from jaxspark.models.layers.linear import Linear, matmul
from jaxspark.models.layers.norm import Float32RMSNorm
from jaxspark.models.layers.rope import PartialRotation
from jaxspark.models.rows import LayerRows, Ring
from jaxspark.parallel.axes import MODEL, size
from pallas_kernels import Entries, sparse_attention
from pallas_kernels.rings import Lookback
from pallas_kernels.sparse_attention.ref import turned_queries


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SparseCache:
    """What the layers of one kind remember.

    Attributes:
      window: ring of the newest keys.
      pending: ring of rows that await compression; None for layers without entries.
      entries: compressed entries.
      index_pending, index_keys: the indexer's; None for layers without one.
    """

    window: Ring
    pending: Ring | None = None
    entries: LayerRows | None = None
    index_pending: Ring | None = None
    index_keys: LayerRows | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionInputs:
    """What attention read, see `sparse_attention`; losses are made of it.

    Attributes:
      latent_TR: of the queries.
      keys_TH, before: recent rows.
      entries: compressed entries; None for layers without.
    """

    latent_TR: Float[Array, "T R"]
    keys_TH: Float[Array, "T H"]
    before: Float[Array, "B W H"] | Lookback
    entries: Entries | None


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
        self.head_dim, self.groups, self.eps = H, groups, eps
        self.window = config.sliding_window

    def init_cache(self, layers: int, slots: int, length: int, dtype) -> SparseCache:
        """Empty caches of `layers` such layers for sequences of `length` positions."""
        size = (layers, slots, length)
        window = Ring.empty(*size, self.head_dim, dtype, lookback=self.window - 1)
        if self.compressor is None:
            return SparseCache(window)
        pending = self.compressor.init_pending(*size)
        chosen = self.indexer is not None
        entries = self.compressor.init_entries(*size, dtype, apart=chosen)
        if self.indexer is None:
            return SparseCache(window, pending, entries)
        index = self.indexer.compressor
        return SparseCache(
            window,
            pending,
            entries,
            index.init_pending(*size),
            index.init_entries(*size, dtype),
        )

    def __call__(
        self,
        x_TD: Float[Array, "T D"],
        cache: SparseCache,
        layer: Int[Array, ""],
        tokens: FlatTokens,
        rotation: PartialRotation,
    ) -> tuple[Float[Array, "T D"], SparseCache, AttentionInputs]:
        """Each token attends to its slot's window and entries; writes all caches."""
        keys_TH = self.keys(x_TD, rotation)
        before, window = cache.window.advance_in_place(
            layer, self.window - 1, keys_TH, tokens
        )
        cache = replace(cache, window=window)
        latent_TR = self.q_a_norm(self.q_a_proj(x_TD))
        entries = None
        if self.compressor is not None:
            cache, entries = self._entries(
                self.compressor, x_TD, latent_TR, cache, layer, tokens, rotation
            )
        inputs = AttentionInputs(latent_TR, keys_TH, before, entries)
        return self.attend(inputs, tokens, rotation), cache, inputs

    def keys(
        self, x_TD: Float[Array, "T D"], rotation: PartialRotation
    ) -> Float[Array, "T H"]:
        """The shared keys, which are the values too."""
        return rotation(self.kv_norm(self.kv_proj(x_TD))[:, None])[:, 0]

    def _entries(
        self,
        compressor: Compressor,
        x_TD: Float[Array, "T D"],
        latent_TR: Float[Array, "T R"],
        cache: SparseCache,
        layer: Int[Array, ""],
        tokens: FlatTokens,
        rotation: PartialRotation,
    ) -> tuple[SparseCache, Entries]:
        """Brings entries up to date, and says which of them tokens see.

        The indexer learns from what attention does and not the other way round, so no
        gradient flows from it into its inputs.
        """
        assert cache.pending is not None and cache.entries is not None
        with jax.named_scope("compress"):
            pending, entries = compressor(
                x_TD, cache.pending, cache.entries, layer, tokens
            )
        cache = replace(cache, pending=pending, entries=entries)
        limits_T = compressor.limits(tokens.positions_T)
        table = entries.table(layer, tokens.pages_BP)
        if self.indexer is None:
            return cache, Entries(table, limits_T=limits_T)
        x_TD, latent_TR = jax.lax.stop_gradient((x_TD, latent_TR))
        assert cache.index_pending is not None and cache.index_keys is not None
        with jax.named_scope("index"):
            pending, keys = self.indexer.compressor(
                x_TD, cache.index_pending, cache.index_keys, layer, tokens
            )
            cache = replace(cache, index_pending=pending, index_keys=keys)
            table_C = keys.table(layer, tokens.pages_BP)
            index = self.indexer(x_TD, latent_TR, table_C, rotation)
        return cache, Entries(table, limits_T=limits_T, index=index)

    def queries(
        self, latent_TR: Float[Array, "T R"], rotation: PartialRotation
    ) -> Float[Array, "T N H"]:
        """Queries, normed per head and rotated."""
        return turned_queries(self._queries(latent_TR), rotation, self.eps)

    def _queries(self, latent_TR: Float[Array, "T R"]) -> Float[Array, "T N H"]:
        """As they are projected: rounded at once, so that nothing wider is written."""
        q_TX = jax.lax.optimization_barrier(self.q_b_proj(latent_TR))
        return q_TX.reshape(len(latent_TR), -1, self.head_dim)

    def attend(
        self,
        inputs: AttentionInputs,
        tokens: FlatTokens,
        rotation: PartialRotation,
        *,
        causal: bool = True,
    ) -> Float[Array, "T D"]:
        """Queries from their latent, attention, and the grouped output projection."""
        T = len(inputs.latent_TR)
        with jax.named_scope("sparse_attention"):
            o_TNH = sparse_attention(
                self._queries(inputs.latent_TR),
                inputs.keys_TH,
                inputs.before,
                self.sinks[...],
                tokens,
                inputs.entries,
                scale=self.head_dim**-0.5,
                causal=causal,
                rotary=rotation,
                query_norm=self.eps,
            )
        groups = self.groups // size(MODEL)
        o_TgI = o_TNH.reshape(T, groups, -1)
        w_gRI = self.o_a_proj.matrix.reshape(groups, -1, o_TgI.shape[-1])
        low_TgR = jax.vmap(matmul, in_axes=(1, 0), out_axes=1)(o_TgI, w_gRI)
        return self.o_b_proj.summed(low_TgR, axes=2)
