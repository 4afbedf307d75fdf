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
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxspark.models.batch import FlatTokens
from jaxspark.models.deepseek_v4_config import DeepSeekV4Config
from jaxspark.models.layers.experts import Experts, MixtureOfExperts, Routing
from jaxspark.models.layers.hyper_connections import HyperConnection, HyperHead
from jaxspark.models.layers.linear import Embedding, Linear, head_logits
from jaxspark.models.layers.norm import Float32RMSNorm
from jaxspark.models.layers.rope import PartialRotation
from jaxspark.models.layers.sparse_attention import (
    AttentionInputs,
    SparseAttention,
    SparseCache,
)
from jaxspark.models.rows import REWIND
from jaxspark.settings import standard_settings
from pallas_kernels import hyper_mix
from pallas_kernels.precision import upcast


@dataclass(frozen=True)
class ForwardContext:
    """What every layer of one pass needs to know of its tokens."""

    tokens: FlatTokens
    plain: PartialRotation
    compressed: PartialRotation

    @classmethod
    def of(cls, config: DeepSeekV4Config, tokens: FlatTokens) -> "ForwardContext":
        """Angles, computed once."""
        width, positions_T = config.qk_rope_head_dim, tokens.positions_T
        return cls(
            tokens,
            PartialRotation.at(config.rope, width, positions_T),
            PartialRotation.at(config.compress_rope, width, positions_T),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerInternals:
    """What a layer did with its tokens; losses are made of it."""

    attention: AttentionInputs
    routing: Routing


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

    def rotation(self, context: ForwardContext) -> PartialRotation:
        """That of its queries and keys."""
        return context.compressed if self.ratio else context.plain

    def __call__(
        self,
        x_TMD: Float[Array, "T M D"],
        cache: SparseCache,
        layer: Int[Array, ""],
        context: ForwardContext,
    ) -> tuple[Float[Array, "T M D"], SparseCache, LayerInternals]:
        """One layer on flat tokens; `layer` is its place in its stack."""
        tokens = context.tokens

        def attend(h_TD):
            h_TD, *rest = self.self_attn(
                h_TD, cache, layer, tokens, self.rotation(context)
            )
            return h_TD, rest

        x_TMD, (written, inputs), routing = self.apply_sublayers(
            attend, x_TMD, layer, tokens
        )
        return x_TMD, written, LayerInternals(inputs, routing)

    def apply_sublayers(self, attend, x_TMD, layer, tokens):
        """The layer around a function that attends.

        Returns:
          The streams, the second result of `attend`, and where experts were chosen.
        """
        with jax.named_scope("attention"):
            h_TD, post_TM, comb_TMM = self.attn_hc(x_TMD)
            h_TD, result = attend(self.input_layernorm(h_TD))
            x_TMD = hyper_mix(h_TD, x_TMD, post_TM, comb_TMM)
        with jax.named_scope("moe"):
            h_TD, post_TM, comb_TMM = self.ffn_hc(x_TMD)
            h_TD = self.post_attention_layernorm(h_TD)
            h_TD, routing = self.mlp(h_TD, tokens.ids_T, tokens.slots_T, layer)
            return hyper_mix(h_TD, x_TMD, post_TM, comb_TMM), result, routing


@dataclass(frozen=True)
class LayerPlace:
    """Where a layer stands: in the model, among its stacks, in its stack."""

    number: int | Int[Array, ""]
    stack: int
    place: Int[Array, ""]


class DeepSeekV4(nnx.Module):
    """A DeepSeek-V4 language model; holds parameters and its configuration only.

    `layers` holds one stack per layer of the pattern: stacks of one before the repeated
    pattern, then stacks of as many as the pattern has repetitions.
    """

    def __init__(self, config: DeepSeekV4Config, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        vocab, D, options = config.vocab_size, config.hidden_size, {"dtype": dtype}
        self.embed_tokens = Embedding(vocab, D, **options, rngs=rngs)
        self.layers = nnx.List(
            stack_layers(
                partial(DeepSeekV4Layer, config, *config.kind(first), dtype=dtype),
                count,
                rngs,
            )
            for first, count in config.layer_stacks
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
            for stack, (_, count) in zip(self.layers, self.config.layer_stacks)
        )

    def embed(self, ids_T: Int[Array, " T"]) -> Float[Array, "T D"]:
        """Embedding rows of token ids."""
        return self.embed_tokens(ids_T)

    def streams(self, x_TD: Float[Array, "T D"]) -> Float[Array, "T M D"]:
        """M residual streams, each of which begins as `x_TD`."""
        return jnp.repeat(x_TD[:, None], self.config.hc_mult, axis=1)

    def logits(self, x_TD: Float[Array, "T D"]) -> Float[Array, "T V"]:
        """float32 logits of final hidden states, the last norm included."""
        with jax.named_scope("head"):
            return head_logits(self.norm(x_TD), self.head_VD)

    @standard_settings()
    def __call__(
        self,
        tokens: FlatTokens,
        cache: Sequence[SparseCache],
        *,
        taps: Sequence[int] = (),
    ) -> tuple[Float[Array, "T D"], Float[Array, "T m D"], tuple[SparseCache, ...]]:
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
          order asked for [T, m, D], and the cache with the tokens' rows written.
        """
        context = ForwardContext.of(self.config, tokens)
        with jax.named_scope("embed"):
            x_TD = self.embed(tokens.ids_T)
        x_TMD = self.streams(x_TD)
        taps_TmD = jnp.zeros((len(x_TD), len(taps), x_TD.shape[1]), x_TD.dtype)
        taps_TmD = _tapped(taps_TmD, taps, -1, x_TMD)

        def step(carry, layer, at):
            x_TMD, taps_TmD, caches = carry
            x_TMD, written, _ = layer(x_TMD, caches[at.stack], at.place, context)
            caches = (*caches[: at.stack], written, *caches[at.stack + 1 :])
            return (x_TMD, _tapped(taps_TmD, taps, at.number, x_TMD), caches), None

        carry, _ = self.through_layers(step, (x_TMD, taps_TmD, tuple(cache)))
        x_TMD, taps_TmD, caches = carry
        for stream in range(self.config.hc_mult):
            index = self.config.num_hidden_layers + stream
            taps_TmD = _tapped(taps_TmD, taps, index, x_TMD[:, stream : stream + 1])
        return self.hc_head(x_TMD), taps_TmD, caches

    def through_layers(self, step, carry, *, slice_experts: bool = False):
        """Carries something through all layers in order.

        Args:
          step: maps a carry, a layer and its `LayerPlace` to the next carry and what to
            keep of the layer.
          carry: the first.
          slice_experts: gives a layer its own experts, `place` 0 among them, as
            gradients want it; else those of all its stack, of which nothing is copied.

        Returns:
          The last carry; of each stack, what was kept of its layers, with a leading
          axis.
        """
        first, period = self.config.layer_pattern

        def run(carry, layer, stack, place):
            number = stack if stack < first else stack + period * place
            place = jnp.int32(0) if slice_experts else place
            with jax.named_scope(f"layer_{stack}"):
                return step(carry, layer, LayerPlace(number, stack, place))

        def select(stack, place):
            return select_layer(self.layers[stack], place, slice_experts=slice_experts)

        kept, zero = [], jnp.int32(0)
        for stack in range(first):
            carry, new = run(carry, select(stack, zero), stack, zero)
            kept.append(jax.tree.map(lambda x: x[None], new))

        def repetition(carry, inputs):
            place, layers = inputs
            kept = []
            for offset in range(period):
                stack = first + offset
                layer = layers[offset] if slice_experts else select(stack, place)
                carry, new = run(carry, layer, stack, place)
                kept.append(new)
            return carry, tuple(kept)

        places = jnp.arange((self.config.num_hidden_layers - first) // period)
        # As inputs of the loop, layers get gradients of their own size.
        layers = tuple(self.layers[first:]) if slice_experts else None
        carry, repeated = jax.lax.scan(repetition, carry, (places, layers))
        return carry, (*kept, *repeated)


def stack_layers(make, count: int, rngs: nnx.Rngs):
    """`count` modules with parameters of their own, as one with a leading axis."""
    keys = jax.random.split(rngs.params(), count)
    return jax.vmap(lambda key: make(rngs=nnx.Rngs(params=key)))(keys)


def select_layer(
    stack: DeepSeekV4Layer, place: Int[Array, ""], *, slice_experts: bool = False
) -> DeepSeekV4Layer:
    """One layer of a stack; its experts stay those of all unless they are sliced."""

    def is_kept(node):
        return isinstance(node, Experts) and not slice_experts

    def pick(node):
        if is_kept(node):
            return node
        return jax.lax.dynamic_index_in_dim(node, place, keepdims=False)

    return jax.tree.map(pick, stack, is_leaf=is_kept)


def from_the_start(
    layer: DeepSeekV4Layer, x_TMD: Float[Array, "T M D"], context: ForwardContext
) -> tuple[Float[Array, "T M D"], LayerInternals]:
    """One layer, its own experts alone, on texts that begin with this pass."""
    tokens = context.tokens
    cache = layer.self_attn.init_cache(1, tokens.slots, tokens.rows, x_TMD.dtype)
    x_TMD, _, internals = layer(x_TMD, cache, jnp.int32(0), context)
    return x_TMD, internals


def _tapped(taps_TmD, taps, layer, x_TMD):
    """The taps, with the mean of the streams where `layer` is asked for."""
    if not taps:
        return taps_TmD
    mean_TD = upcast(x_TMD).mean(1).astype(taps_TmD.dtype)
    asked_m = jnp.array(taps) == layer
    return jnp.where(asked_m[:, None], mean_TD[:, None], taps_TmD)
