"""DeepSeek-V4 (arXiv 2606.19348): sparse attention, hyper-connections, experts.

    x_1..x_M = embed(ids)                                  M residual streams
    x = hyper(attention, norm), x = hyper(experts, norm)   for every layer
    logits = head(norm(collapse(x)))

Layers repeat a pattern: Flash has three of their own, then HCA and CSA twenty times.
The repeated ones run in a loop over stacked parameters, so a deep model compiles as
fast as a shallow one. Caches are stacked alike and carried through the loop, where
every layer reads and writes its own rows in place; experts are never sliced, each
product picks its matrices out of all layers' (see `grouped_matmul`).

Inside a layer, parameter names are those of Hugging Face's checkpoints.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxspark.models.batch import FlatTokens, SlotView
from jaxspark.models.layers.experts import Experts, MixtureOfExperts
from jaxspark.models.layers.hyper_connections import HyperConnection, HyperHead, mix
from jaxspark.models.layers.linear import Embedding, Linear, row_product
from jaxspark.models.layers.norm import Float32RMSNorm
from jaxspark.models.layers.rope import RopeConfig, TrailingRotation
from jaxspark.models.layers.sparse_attention import SparseAttention, SparseCache
from jaxspark.models.rows import REWIND
from jaxspark.settings import standard_settings
from pallas_kernels.precision import widened


@dataclass(frozen=True, kw_only=True)
class DeepSeekV4Config:
    """Architecture, under the names of the released `config.json`.

    Attributes:
      compress_ratios: per layer, positions per compressed entry: 0 (window only),
        `csa_ratio` or `hca_ratio`.
      num_hash_layers: first layers, whose experts are looked up by token id.
      rope: of layers without entries.
      compress_rope: of layers with entries: queries, keys, entries and index.
    """

    vocab_size: int
    hidden_size: int
    moe_intermediate_size: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    n_routed_experts: int
    num_experts_per_tok: int
    compress_ratios: tuple[int, ...]
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    num_hash_layers: int = 3
    n_shared_experts: int = 1
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    sliding_window: int = 128
    csa_ratio: int = 4
    hca_ratio: int = 128
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    compress_rope: RopeConfig = field(
        default_factory=lambda: RopeConfig(
            rope_type="yarn",
            rope_theta=160000.0,
            factor=16.0,
            original_max_position_embeddings=65536,
            attention_factor=1.0,
        )
    )
    max_position_embeddings: int = 1048576
    initializer_range: float = 0.02

    def __post_init__(self):
        known = {0, self.csa_ratio, self.hca_ratio}
        if not self.compress_ratios or not set(self.compress_ratios) <= known:
            raise ValueError(
                f"compress_ratios must hold one of {sorted(known)} for every layer, "
                f"got {self.compress_ratios}"
            )
        for name, value, divisor in (
            ("num_attention_heads", self.num_attention_heads, self.o_groups),
            ("qk_rope_head_dim", self.qk_rope_head_dim, 2),
        ):
            if value % divisor:
                raise ValueError(f"{name} must be a multiple of {divisor}, got {value}")
        for name, value, least in (
            ("head_dim", self.head_dim, self.qk_rope_head_dim),
            ("index_head_dim", self.index_head_dim, self.qk_rope_head_dim),
            ("n_routed_experts", self.n_routed_experts, self.num_experts_per_tok),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name in ("rope", "compress_rope"):
            scale = getattr(self, name).frequencies(self.qk_rope_head_dim)[1]
            if scale != 1:
                raise ValueError(
                    f"{name} scales cos and sin by {scale:.4g}, but outputs are turned "
                    "back by the same angles; set its attention_factor to 1"
                )

    @property
    def num_hidden_layers(self) -> int:
        """Depth."""
        return len(self.compress_ratios)

    def kind(self, layer: int) -> tuple[int, bool]:
        """What a layer is built from: its compression ratio, and hashed experts."""
        return self.compress_ratios[layer], layer < self.num_hash_layers

    @property
    def plan(self) -> tuple[int, int]:
        """Layers before the repeated pattern, and of one repetition: the least sum."""
        kinds = [self.kind(layer) for layer in range(self.num_hidden_layers)]
        depth = len(kinds)
        plans = [
            (first, period)
            for first in range(depth)
            for period in range(1, depth - first + 1)
            if (depth - first) % period == 0
            and kinds[first:]
            == kinds[first : first + period] * ((depth - first) // period)
        ]
        return min(plans, key=lambda plan: (sum(plan), plan[1]))


@dataclass(frozen=True)
class Pass:
    """What every layer of one pass needs to know of its tokens."""

    tokens: FlatTokens
    view: SlotView
    plain: TrailingRotation
    compressed: TrailingRotation

    @classmethod
    def of(cls, config: DeepSeekV4Config, tokens: FlatTokens) -> "Pass":
        """Views and angles, computed once."""
        width, positions_T = config.qk_rope_head_dim, tokens.positions_T
        return cls(
            tokens,
            tokens.view(),
            TrailingRotation.at(config.rope, width, positions_T),
            TrailingRotation.at(config.compress_rope, width, positions_T),
        )


class DeepSeekV4Layer(nnx.Module):
    """Attention and experts, each between hyper-connections."""

    def __init__(
        self, config: DeepSeekV4Config, ratio: int, hashed: bool, *, dtype, rngs
    ):
        D, eps, options = config.hidden_size, config.rms_norm_eps, {"dtype": dtype}
        self.attn_hc = HyperConnection(config, rngs=rngs)
        self.input_layernorm = Float32RMSNorm(D, eps=eps, **options)
        self.self_attn = SparseAttention(config, ratio, **options, rngs=rngs)
        self.ffn_hc = HyperConnection(config, rngs=rngs)
        self.post_attention_layernorm = Float32RMSNorm(D, eps=eps, **options)
        self.mlp = MixtureOfExperts(config, hashed=hashed, **options, rngs=rngs)
        self.ratio = ratio

    def __call__(
        self,
        x_MDT: Float[Array, "M D T"],
        cache: SparseCache,
        layer: Int[Array, ""],
        run: Pass,
    ) -> tuple[Float[Array, "M D T"], SparseCache]:
        """One layer on flat tokens; `layer` is its place in its stack."""
        rotation = run.compressed if self.ratio else run.plain

        def attend(h_DT):
            return self.self_attn(h_DT, cache, layer, run.tokens, run.view, rotation)

        x_MDT, cache, _ = self.around(attend, x_MDT, layer, run.tokens)
        return x_MDT, cache

    def around(self, attend, x_MDT, layer, tokens):
        """The layer around a function that attends.

        Returns:
          The streams, the second result of `attend`, and where experts were chosen.
        """
        with jax.named_scope("attention"):
            h_DT, post_MT, comb_MMT = self.attn_hc(x_MDT)
            h_DT, result = attend(self.input_layernorm(h_DT))
            x_MDT = mix(h_DT, x_MDT, post_MT, comb_MMT)
        with jax.named_scope("moe"):
            h_DT, post_MT, comb_MMT = self.ffn_hc(x_MDT)
            h_DT = self.post_attention_layernorm(h_DT)
            h_DT, routing = self.mlp(h_DT, tokens.ids_T, tokens.slots_T, layer)
            return mix(h_DT, x_MDT, post_MT, comb_MMT), result, routing


class DeepSeekV4(nnx.Module):
    """A DeepSeek-V4 language model; holds parameters and its configuration only.

    `layers` holds one stack per layer of the plan: stacks of one before the repeated
    pattern, then stacks of as many as the pattern has repetitions.
    """

    def __init__(self, config: DeepSeekV4Config, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        vocab, D, options = config.vocab_size, config.hidden_size, {"dtype": dtype}
        self.embed_tokens = Embedding(vocab, D, **options, rngs=rngs)
        self.layers = nnx.List(
            stacked(
                partial(DeepSeekV4Layer, config, *config.kind(first), dtype=dtype),
                count,
                rngs,
            )
            for first, count in stacks(config)
        )
        self.hc_head = HyperHead(config, rngs=rngs)
        self.norm = Float32RMSNorm(D, eps=config.rms_norm_eps, **options)
        self.lm_head = Linear(D, vocab, **options, rngs=rngs)

    @property
    def dtype(self):
        """Type of activations and of cached keys and entries."""
        return self.embed_tokens.weight.dtype

    @property
    def max_rewind(self) -> int:
        """Most positions that a slot may be set back by, and so most drafts."""
        return REWIND

    @property
    def head_VD(self) -> Float[Array, "V D"]:
        """The LM head's matrix."""
        return self.lm_head.matrix

    def init_cache(self, slots: int, length: int) -> tuple[SparseCache, ...]:
        """Empty caches of all stacks, for sequences of up to `length` positions."""
        return tuple(
            stack.self_attn.init_cache(count, slots, length, self.dtype)
            for stack, (_, count) in zip(self.layers, stacks(self.config))
        )

    def embed(self, ids_T: Int[Array, " T"]) -> Float[Array, "D T"]:
        """Embedding columns of token ids."""
        return self.embed_tokens(ids_T)

    def logits(self, x_DT: Float[Array, "D T"]) -> Float[Array, "T V"]:
        """float32 logits of final hidden states, the last norm included."""
        with jax.named_scope("head"):
            return row_product(self.head_VD, self.norm(x_DT))

    @standard_settings()
    def __call__(
        self,
        tokens: FlatTokens,
        cache: Sequence[SparseCache],
        *,
        taps: Sequence[int] = (),
    ) -> tuple[Float[Array, "D T"], Float[Array, "m D T"], tuple[SparseCache, ...]]:
        """Processes T flat tokens of any mix of slots.

        Args:
          tokens: what to process; each token sees its slot's earlier positions and
            itself (`limits_T` is for attention that is not causal, and not read here).
          cache: of `init_cache`, holding all earlier positions.
          taps: layers whose outputs to return, 0-based, as means over the streams; -1
            is the embedding, and from `num_hidden_layers` on the single streams after
            the last layer.

        Returns:
          Collapsed hidden states before the last norm (see `logits`), the taps in the
          order asked for [m, D, T], and the cache with the tokens' rows written.
        """
        run = Pass.of(self.config, tokens)
        with jax.named_scope("embed"):
            x_DT = self.embed(tokens.ids_T)
        x_MDT = jnp.broadcast_to(x_DT, (self.config.hc_mult, *x_DT.shape))
        taps_mDT = jnp.zeros((len(taps), *x_DT.shape), x_DT.dtype)
        taps_mDT = _tapped(taps_mDT, taps, -1, x_MDT)

        first, period = self.config.plan
        cache = list(cache)
        for index in range(first):
            with jax.named_scope(f"layer_{index}"):
                stack, zero = self.layers[index], jnp.int32(0)
                x_MDT, cache[index] = member(stack, zero)(
                    x_MDT, cache[index], zero, run
                )
            taps_mDT = _tapped(taps_mDT, taps, index, x_MDT)

        def repetition(carry, place):
            x_MDT, taps_mDT, caches = carry
            written = []
            for offset, stack in enumerate(self.layers[first:]):
                with jax.named_scope(f"layer_{first + offset}"):
                    x_MDT, part = member(stack, place)(
                        x_MDT, caches[offset], place, run
                    )
                written.append(part)
                index = first + offset + period * place
                taps_mDT = _tapped(taps_mDT, taps, index, x_MDT)
            return (x_MDT, taps_mDT, tuple(written)), None

        repetitions = (self.config.num_hidden_layers - first) // period
        carry = (x_MDT, taps_mDT, tuple(cache[first:]))
        (x_MDT, taps_mDT, caches), _ = jax.lax.scan(
            repetition, carry, jnp.arange(repetitions)
        )
        for stream in range(self.config.hc_mult):
            index = self.config.num_hidden_layers + stream
            taps_mDT = _tapped(taps_mDT, taps, index, x_MDT[stream : stream + 1])
        return self.hc_head(x_MDT), taps_mDT, (*cache[:first], *caches)


def stacks(config: DeepSeekV4Config) -> list[tuple[int, int]]:
    """First layer and number of layers of each stack, which lie `period` apart."""
    first, period = config.plan
    repetitions = (config.num_hidden_layers - first) // period
    alone = [(layer, 1) for layer in range(first)]
    return alone + [(first + offset, repetitions) for offset in range(period)]


def stacked(make, count: int, rngs: nnx.Rngs):
    """`count` modules with parameters of their own, as one with a leading axis."""
    keys = jax.random.split(rngs.params(), count)
    return jax.vmap(lambda key: make(rngs=nnx.Rngs(params=key)))(keys)


def member(stack: DeepSeekV4Layer, place: Int[Array, ""]) -> DeepSeekV4Layer:
    """One layer of a stack; its experts stay those of all."""

    def pick(node):
        if isinstance(node, Experts):
            return node
        return jax.lax.dynamic_index_in_dim(node, place, keepdims=False)

    return jax.tree.map(pick, stack, is_leaf=lambda node: isinstance(node, Experts))


def _tapped(taps_mDT, taps, layer, x_MDT):
    """The taps, with the mean of the streams where `layer` is asked for."""
    if not taps:
        return taps_mDT
    mean_DT = widened(x_MDT).mean(0).astype(taps_mDT.dtype)
    asked_m = jnp.array(taps) == layer
    return jnp.where(asked_m[:, None, None], mean_DT, taps_mDT)
