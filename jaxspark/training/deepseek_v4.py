"""Training DeepSeek-V4: whole texts forward, and what the loss is made of.

    loss = CE + 1e-4 balance + indexer + 0.3 CE of multi-token prediction

Texts are the slots of one pass: they do not see each other, and each is compressed on
its own. Caches begin empty with each layer and are dropped after it. Layers are
computed again on the way back.

*Balance*, per text (V3 report, equations 17-20), summed over layers that choose: sum_e
f_e P_e, where f_e is the share of assignments an expert got times E, and P_e its mean
share of scores. *Indexer*: KL(p || indexer), where p is the layer's own attention (one
softmax over window, entries and sink), summed over heads, kept for the entries and
normalized again; gradients reach the indexer alone. What evens out loads is a bias
outside the loss, see `update_router_bias`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxspark.drafters.mtp import MTPDrafter
from jaxspark.models import DeepSeekV4, FlatTokens
from jaxspark.models.deepseek_v4 import (
    DeepSeekV4Layer,
    ForwardContext,
    LayerInternals,
    from_the_start,
)
from jaxspark.models.layers.experts import Routing
from jaxspark.models.layers.rope import PartialRotation
from jaxspark.models.layers.sparse_attention import AttentionInputs, SparseAttention
from jaxspark.parallel.axes import sum_of
from pallas_kernels import Index, index_scores, top_k
from pallas_kernels.rings import in_order
from pallas_kernels.sparse_attention.ref import (
    masked_scores,
    recent_rows,
    recent_spans,
)


def _as_it_is(layer: DeepSeekV4Layer, stack: int) -> DeepSeekV4Layer:
    return layer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerStats:
    """What the layers of one stack did; its members are the rows.

    Attributes:
      load_LE: tokens that each expert got.
      balance_L: the balance loss, 1 if all is even; 0 where experts are hashed.
      index_L: the indexer's loss in nats, 0 without one.
    """

    load_LE: Float[Array, "L E"]
    balance_L: Float[Array, " L"]
    index_L: Float[Array, " L"]


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the terms beside the cross entropy (report, section 4.2.2)."""

    balance: float = 1e-4
    index: float = 1.0
    mtp: float = 0.3


def forward(
    model: DeepSeekV4,
    tokens: FlatTokens,
    *,
    dense_index: bool = False,
    gather_layer: Callable[[DeepSeekV4Layer, int], DeepSeekV4Layer] = _as_it_is,
) -> tuple[Float[Array, "T M D"], tuple[LayerStats, ...]]:
    """Whole texts through all layers.

    Args:
      model: the target.
      tokens: texts that begin with this pass, one per slot.
      dense_index: teach indexers on all entries, not on those chosen (warm-up).
      gather_layer: makes a layer of its stack whole, where it is kept in shards.

    Returns:
      The streams after the last layer, and what the layers of each stack did.
    """
    context = ForwardContext.of(model.config, tokens)

    def step(x_TMD, layer, at):
        @jax.checkpoint
        def run(layer, x_TMD):
            layer = gather_layer(layer, at.stack)
            x_TMD, internals = from_the_start(layer, x_TMD, context)
            stats = layer_stats(layer, internals, context, dense_index=dense_index)
            return x_TMD, stats

        return run(layer, x_TMD)

    x_TMD = model.streams(model.embed(tokens.ids_T))
    return model.through_layers(step, x_TMD, slice_experts=True)


def layer_stats(
    layer: DeepSeekV4Layer,
    internals: LayerInternals,
    context: ForwardContext,
    *,
    dense_index: bool,
) -> LayerStats:
    """What one layer did."""
    load_E, balance = load_and_balance(internals.routing, context.tokens)
    if layer.mlp.gate.hashed:
        balance = jnp.zeros(())
    index = jnp.zeros(())
    entries = internals.attention.entries
    if entries is not None and entries.index is not None:
        index = index_loss(
            layer.self_attn,
            internals.attention,
            scores_of(entries.index, context.tokens),
            context.tokens,
            layer.rotation(context),
            dense=dense_index,
        )
    return LayerStats(load_E, balance, index)


def scores_of(index: Index, tokens: FlatTokens) -> Float[Array, "T C"]:
    """An indexer's, of every entry."""
    return index_scores(index.q_TNH, index.keys, index.weights_TN, tokens)


def load_and_balance(
    routing: Routing, tokens: FlatTokens
) -> tuple[Float[Array, " E"], Float[Array, ""]]:
    """Tokens per expert, and the balance loss, the mean over texts."""
    T, E = routing.scores_TE.shape
    real_T = tokens.slots_T >= 0
    chosen_TE = (
        jnp.zeros((T, E)).at[jnp.arange(T)[:, None], routing.experts_TX].add(1.0)
    )
    chosen_TE *= real_T[:, None]
    share_TE = routing.scores_TE / routing.scores_TE.sum(1, keepdims=True)
    slot_T = jnp.where(real_T, tokens.slots_T, tokens.slots)

    def per_text(x_TE):
        return jax.ops.segment_sum(x_TE, slot_T, tokens.slots + 1)[:-1]

    count_B1 = jnp.maximum(per_text(real_T[:, None].astype(jnp.float32)), 1.0)
    picks = routing.experts_TX.shape[1]
    share_BE = per_text(share_TE * real_T[:, None]) / count_B1
    frequency_BE = E / picks * per_text(chosen_TE) / count_B1
    each_B = jnp.sum(jax.lax.stop_gradient(frequency_BE) * share_BE, axis=1)
    balance = jnp.sum(each_B) / jnp.maximum(sum_of(each_B > 0), 1)
    return chosen_TE.sum(0), balance


def index_loss(
    attention: SparseAttention,
    inputs: AttentionInputs,
    scores_TC: Float[Array, "T C"],
    tokens: FlatTokens,
    rotation: PartialRotation,
    *,
    dense: bool,
) -> Float[Array, ""]:
    """Divergence of the indexer from what its layer attends to, in nats per query."""
    entries = inputs.entries
    assert entries is not None and entries.index is not None
    index, limits_T = entries.index, entries.limits_T
    assert limits_T is not None
    inputs, attention = jax.lax.stop_gradient((inputs, attention))
    entries_BCH = jax.lax.stop_gradient(entries.table.whole())
    entry_C = jnp.arange(entries_BCH.shape[1])
    # Index keys may lie in whole tiles, with room for more than there are entries.
    scores_TC = scores_TC[:, : len(entry_C)]
    open_TC = entry_C < limits_T[:, None]
    if not dense:
        least = jax.lax.stop_gradient(scores_TC)
        chosen_TX = top_k(least, limits_T, k=index.picks)
        open_TC &= jnp.any(chosen_TX[..., None] == entry_C, axis=1)
    open_BQC = tokens.padded(open_TC, False)
    q_BQNH = tokens.padded(attention.queries(inputs.latent_TR, rotation), 0)
    before_BWH = in_order(inputs.before, tokens)
    recent_BRH = recent_rows(before_BWH, inputs.keys_TH, tokens)
    spans_BQ2 = recent_spans(tokens, before_BWH.shape[1])
    row_R = jnp.arange(recent_BRH.shape[1])
    recent_BQR = (row_R >= spans_BQ2[..., :1]) & (row_R < spans_BQ2[..., 1:])

    def logits(keys_BSH, seen_BQS):
        return masked_scores(q_BQNH, keys_BSH, seen_BQS, attention.head_dim**-0.5)

    sinks_BQN1 = jnp.broadcast_to(attention.sinks[...][:, None], (*q_BQNH.shape[:3], 1))
    parts = (logits(recent_BRH, recent_BQR), sinks_BQN1)
    entry_BQNC = logits(entries_BCH, open_BQC)
    joint = jax.nn.softmax(jnp.concatenate([entry_BQNC, *parts], axis=-1), axis=-1)
    mass_BQC = joint[..., : len(entry_C)].sum(2)
    taught_BQ = jnp.any(open_BQC, axis=-1)
    target_BQC = mass_BQC / jnp.maximum(mass_BQC.sum(-1, keepdims=True), 1e-20)
    # Rows without entries have no softmax; they do not count.
    safe_BQC = jnp.where(open_BQC, tokens.padded(scores_TC, 0), -1e30)
    log_q_BQC = jax.nn.log_softmax(safe_BQC, axis=-1)
    log_p_BQC = jnp.log(jnp.maximum(target_BQC, 1e-20))
    each_BQC = jnp.where(open_BQC, target_BQC * (log_p_BQC - log_q_BQC), 0.0)
    divergence = jnp.sum(jnp.where(taught_BQ, each_BQC.sum(-1), 0.0))
    return divergence / jnp.maximum(sum_of(taught_BQ), 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Metrics:
    """What a step saw.

    Attributes:
      cross_entropy: nats per token.
      mtp: the same of multi-token prediction, 0 without.
      balance, index: sums over layers, those of multi-token prediction included.
      stats: of every stack.
      mtp_stats: of multi-token prediction's stage, None without.
    """

    cross_entropy: Float[Array, ""]
    mtp: Float[Array, ""]
    balance: Float[Array, ""]
    index: Float[Array, ""]
    stats: tuple[LayerStats, ...]
    mtp_stats: LayerStats | None


def pretraining_loss(
    model: DeepSeekV4,
    tokens: FlatTokens,
    mtp: MTPDrafter | None = None,
    *,
    weights: LossWeights = LossWeights(),
    dense_index: bool = False,
    gather_layer: Callable[[DeepSeekV4Layer, int], DeepSeekV4Layer] = _as_it_is,
) -> tuple[Float[Array, ""], Metrics]:
    """The loss of whole texts, one per slot of `tokens`.

    On a mesh of several shards of slots it is a shard's part, and so are the metrics:
    those of all shards add up.

    Args:
      model: the target.
      tokens: texts that begin with this pass.
      mtp: a module that is trained beside it.
      weights: of the terms beside the cross entropy.
      dense_index: see `forward`.
      gather_layer: see `forward`.
    """
    x_TMD, stats = forward(
        model, tokens, dense_index=dense_index, gather_layer=gather_layer
    )
    next_T, known_T = _following(tokens, 1)
    logits_TV = model.logits(model.hc_head(x_TMD))
    entropy = _cross_entropy(logits_TV, next_T, known_T)
    extra, mtp_stats = jnp.zeros(()), None
    if mtp is not None:
        later_T, known_T = _following(tokens, 2)
        logits_TV, routing = mtp.logits(model, x_TMD, next_T, tokens)
        extra = _cross_entropy(logits_TV, later_T, known_T)
        load_E, balance = load_and_balance(routing, tokens)
        mtp_stats = LayerStats(load_E[None], balance[None], jnp.zeros(1))
    everyone = stats if mtp_stats is None else (*stats, mtp_stats)
    # Sums over layers: each has a router, and perhaps an indexer, of its own.
    balance = jnp.sum(jnp.concatenate([each.balance_L for each in everyone]))
    index = jnp.sum(jnp.concatenate([each.index_L for each in everyone]))
    loss = entropy + weights.balance * balance + weights.index * index
    loss += weights.mtp * extra
    return loss, Metrics(entropy, extra, balance, index, stats, mtp_stats)


def _following(tokens, distance) -> tuple[Int[Array, " T"], Bool[Array, " T"]]:
    """The token `distance` positions later, and whether its text has one."""
    ids_BQ = tokens.padded(tokens.ids_T, -1)
    later_BQ = jnp.pad(
        ids_BQ[:, distance:], ((0, 0), (0, distance)), constant_values=-1
    )
    later_T = tokens.flat(later_BQ)
    known_T = (later_T >= 0) & (tokens.slots_T >= 0)
    return jnp.maximum(later_T, 0), known_T


def _cross_entropy(logits_TV, labels_T, known_T):
    log_p_TV = jax.nn.log_softmax(logits_TV, axis=-1)
    each_T = -jnp.take_along_axis(log_p_TV, labels_T[:, None], axis=1)[:, 0]
    return jnp.sum(jnp.where(known_T, each_T, 0.0)) / jnp.maximum(sum_of(known_T), 1)


def update_router_bias[M: (DeepSeekV4, MTPDrafter)](
    model: M, stats: tuple[LayerStats, ...], *, speed: float = 1e-3
) -> M:
    """The model with biases moved against loads (report, section 4.2.2).

    Experts with more than the mean load get `speed` less, those with less get it more;
    hashed layers have no bias. To be called after the optimizer's step, not in it.

    Args:
      model: the target, or its multi-token prediction.
      stats: of the step: `Metrics.stats`, or `Metrics.mtp_stats` alone.
      speed: of the bias, per step.
    """
    graph, state = nnx.split(model)
    flat = []
    for path, variable in nnx.to_flat_state(state):
        if path[-1] == "e_score_correction_bias":
            stack = int(str(path[1])) if path[0] == "layers" else 0
            load_LE = stats[stack].load_LE
            mean_L1 = load_LE.mean(axis=1, keepdims=True)
            moved = variable.get_value() + speed * jnp.sign(mean_L1 - load_LE)
            variable = variable.replace(moved)
        flat.append((path, variable))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def imbalance(stats: tuple[LayerStats, ...]) -> Float[Array, ""]:
    """Largest load of an expert over the mean, the worst of all layers."""
    load_LE = jnp.concatenate([each.load_LE for each in stats])
    return jnp.max(load_LE.max(1) / load_LE.mean(1))
