"""Training DeepSeek-V4: whole texts forward, and what the loss is made of.

    loss = CE + 1e-4 balance + indexer + 0.3 CE of multi-token prediction

Texts are the slots of one pass: they do not see each other, and each is compressed on
its own. There are no caches. The repeated layers run in a loop that recomputes them on
the way back.

*Balance*, per text (V3 report, equations 17-20), summed over layers that choose: sum_e
f_e P_e, where f_e is the share of assignments an expert got times E, and P_e its mean
share of scores. *Indexer*: KL(p || indexer), where p is the layer's own attention (one
softmax over window, entries and sink), summed over heads, kept for the entries and
normalised again; gradients reach the indexer alone. What evens out loads is a bias
outside the loss, see `balanced`.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxspark.drafters.mtp import MTPDrafter
from jaxspark.models import DeepSeekV4, FlatTokens
from jaxspark.models.batch import SlotView
from jaxspark.models.deepseek_v4 import DeepSeekV4Layer, Pass
from jaxspark.models.layers.experts import Routing
from jaxspark.models.layers.rope import TrailingRotation
from jaxspark.models.layers.sparse_attention import Looked, SparseAttention
from pallas_kernels.sparse_attention.ref import masked_scores


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Report:
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
    model: DeepSeekV4, tokens: FlatTokens, *, dense_index: bool = False
) -> tuple[Float[Array, "M D T"], tuple[Report, ...]]:
    """Whole texts through all layers.

    Args:
      model: the target.
      tokens: texts that begin with this pass, one per slot.
      dense_index: teach indexers on all entries, not on those chosen (warm-up).

    Returns:
      The streams after the last layer, and a report for each of the model's stacks.
    """
    run = Pass.of(model.config, tokens)
    x_DT = model.embed(tokens.ids_T)
    x_MDT = jnp.broadcast_to(x_DT, (model.config.hc_mult, *x_DT.shape))
    step = jax.checkpoint(partial(_layer, run, dense_index))
    first, _ = model.config.plan
    reports = []
    for stack in model.layers[:first]:
        x_MDT, report = step(jax.tree.map(lambda w: w[0], stack), x_MDT)
        reports.append(jax.tree.map(lambda x: x[None], report))

    def repetition(x_MDT, layers):
        done = []
        for layer in layers:
            x_MDT, report = step(layer, x_MDT)
            done.append(report)
        return x_MDT, tuple(done)

    x_MDT, repeated = jax.lax.scan(repetition, x_MDT, tuple(model.layers[first:]))
    return x_MDT, (*reports, *repeated)


def _layer(run: Pass, dense_index: bool, layer: DeepSeekV4Layer, x_MDT):
    """One layer, and its report as a row of one."""
    rotation = run.compressed if layer.ratio else run.plain

    def attend(h_DT):
        return layer.self_attn.of_whole(h_DT, run.tokens, run.view, rotation)

    x_MDT, looked, routing = layer.around(attend, x_MDT, jnp.int32(0), run.tokens)
    load_E, balance = load_and_balance(routing, run.tokens)
    if layer.mlp.gate.hashed:
        balance = jnp.zeros(())
    index = jnp.zeros(())
    if looked.scores_BQC is not None:
        index = index_loss(
            layer.self_attn, looked, run.view, rotation, dense=dense_index
        )
    return x_MDT, Report(load_E, balance, index)


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
    return chosen_TE.sum(0), jnp.sum(each_B) / jnp.maximum(jnp.sum(each_B > 0), 1)


def index_loss(
    attention: SparseAttention,
    looked: Looked,
    view: SlotView,
    rotation: TrailingRotation,
    *,
    dense: bool,
) -> Float[Array, ""]:
    """Divergence of the indexer from what its layer attends to, in nats per query."""
    scores_BQC, compressor = looked.scores_BQC, attention.compressor
    assert scores_BQC is not None and compressor is not None
    looked, attention = jax.lax.stop_gradient((looked, attention))
    [entries_BCH], chosen_BQX = looked.seen["entries_LBCH"], looked.seen["chosen_BQX"]
    real_BQ = view.index_BQ < looked.latent_RT.shape[1]
    rows = jnp.arange(looked.recent_BRH.shape[1])
    recent_BQR = (rows >= looked.spans_BQ2[..., :1]) & (
        rows < looked.spans_BQ2[..., 1:]
    )
    row_Q = jnp.arange(real_BQ.shape[1])
    limits_Q1 = compressor.limits(row_Q)[:, None]
    open_BQC = jnp.broadcast_to(
        jnp.arange(entries_BCH.shape[1]) < limits_Q1, scores_BQC.shape
    )
    if not dense:
        open_BQC &= jnp.any(
            chosen_BQX[..., None] == jnp.arange(entries_BCH.shape[1]), axis=2
        )
    q_BQNH = view.spread(attention.queries(looked.latent_RT, rotation), 0)

    def logits(keys_BSH, seen_BQS):
        return masked_scores(q_BQNH, keys_BSH, seen_BQS, attention.head_dim**-0.5)

    sinks_BQN1 = jnp.broadcast_to(attention.sinks[...][:, None], (*q_BQNH.shape[:3], 1))
    parts = (logits(looked.recent_BRH, recent_BQR), sinks_BQN1)
    entry_BQNC = logits(entries_BCH, open_BQC)
    joint = jax.nn.softmax(jnp.concatenate([entry_BQNC, *parts], axis=-1), axis=-1)
    mass_BQC = joint[..., : entries_BCH.shape[1]].sum(2)
    taught_BQ = real_BQ & jnp.any(open_BQC, axis=-1)
    target_BQC = mass_BQC / jnp.maximum(mass_BQC.sum(-1, keepdims=True), 1e-20)
    # Rows without entries have no softmax; they do not count.
    safe_BQC = jnp.where(open_BQC, scores_BQC, -1e30)
    log_q_BQC = jax.nn.log_softmax(safe_BQC, axis=-1)
    log_p_BQC = jnp.log(jnp.maximum(target_BQC, 1e-20))
    each_BQC = jnp.where(open_BQC, target_BQC * (log_p_BQC - log_q_BQC), 0.0)
    total = jnp.sum(jnp.where(taught_BQ, each_BQC.sum(-1), 0.0))
    return total / jnp.maximum(jnp.sum(taught_BQ), 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Metrics:
    """What a step saw.

    Attributes:
      cross_entropy: nats per token.
      mtp: the same of multi-token prediction, 0 without.
      balance, index: sums over layers, those of multi-token prediction included.
      reports: of every stack.
      mtp_report: of multi-token prediction's stage, None without.
    """

    cross_entropy: Float[Array, ""]
    mtp: Float[Array, ""]
    balance: Float[Array, ""]
    index: Float[Array, ""]
    reports: tuple[Report, ...]
    mtp_report: Report | None


def pretraining_loss(
    model: DeepSeekV4,
    tokens: FlatTokens,
    mtp: MTPDrafter | None = None,
    *,
    weights: LossWeights = LossWeights(),
    dense_index: bool = False,
) -> tuple[Float[Array, ""], Metrics]:
    """The loss of whole texts, one per slot of `tokens`.

    Args:
      model: the target.
      tokens: texts that begin with this pass.
      mtp: a module that is trained beside it.
      weights: of the terms beside the cross entropy.
      dense_index: see `forward`.
    """
    view = tokens.view()
    x_MDT, reports = forward(model, tokens, dense_index=dense_index)
    next_T, known_T = _following(tokens, view, 1)
    logits_TV = model.logits(model.hc_head(x_MDT))
    entropy = _cross_entropy(logits_TV, next_T, known_T)
    extra, mtp_report = jnp.zeros(()), None
    if mtp is not None:
        later_T, known_T = _following(tokens, view, 2)
        logits_TV, routing = mtp.of_whole(model, x_MDT, next_T, tokens)
        extra = _cross_entropy(logits_TV, later_T, known_T)
        load_E, balance = load_and_balance(routing, tokens)
        mtp_report = Report(load_E[None], balance[None], jnp.zeros(1))
    everyone = reports if mtp_report is None else (*reports, mtp_report)
    # Sums over layers: each has a router, and perhaps an indexer, of its own.
    balance = jnp.sum(jnp.concatenate([report.balance_L for report in everyone]))
    index = jnp.sum(jnp.concatenate([report.index_L for report in everyone]))
    loss = entropy + weights.balance * balance + weights.index * index
    loss += weights.mtp * extra
    return loss, Metrics(entropy, extra, balance, index, reports, mtp_report)


def _following(tokens, view, distance) -> tuple[Int[Array, " T"], Bool[Array, " T"]]:
    """The token `distance` positions later, and whether its text has one."""
    ids_BQ = view.spread(tokens.ids_T, -1)
    later_BQ = jnp.pad(
        ids_BQ[:, distance:], ((0, 0), (0, distance)), constant_values=-1
    )
    later_T = view.collect(later_BQ)
    known_T = (later_T >= 0) & (tokens.slots_T >= 0)
    return jnp.maximum(later_T, 0), known_T


def _cross_entropy(logits_TV, labels_T, known_T):
    log_p_TV = jax.nn.log_softmax(logits_TV, axis=-1)
    each_T = -jnp.take_along_axis(log_p_TV, labels_T[:, None], axis=1)[:, 0]
    return jnp.sum(jnp.where(known_T, each_T, 0.0)) / jnp.maximum(jnp.sum(known_T), 1)


def balanced[M: (DeepSeekV4, MTPDrafter)](
    model: M, reports: tuple[Report, ...], *, speed: float = 1e-3
) -> M:
    """The model with biases moved against loads (report, section 4.2.2).

    Experts with more than the mean load get `speed` less, those with less get it more;
    hashed layers have no bias. To be called after the optimizer's step, not in it.

    Args:
      model: the target, or its multi-token prediction.
      reports: of the step: `Metrics.reports`, or `Metrics.mtp_report` alone.
      speed: of the bias, per step.
    """
    graph, state = nnx.split(model)
    flat = []
    for path, variable in nnx.to_flat_state(state):
        if path[-1] == "e_score_correction_bias":
            stack = int(str(path[1])) if path[0] == "layers" else 0
            load_LE = reports[stack].load_LE
            mean_L1 = load_LE.mean(axis=1, keepdims=True)
            moved = variable.get_value() + speed * jnp.sign(mean_L1 - load_LE)
            variable = variable.replace(moved)
        flat.append((path, variable))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def imbalance(reports: tuple[Report, ...]) -> Float[Array, ""]:
    """Largest load of an expert over the mean, the worst of all layers."""
    load_LE = jnp.concatenate([report.load_LE for report in reports])
    return jnp.max(load_LE.max(1) / load_LE.mean(1))
