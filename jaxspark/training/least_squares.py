"""A DSpark drafter before its first step, fitted by least squares, map by map.

Much of what a drafter first learns is linear: which context row to look at, and what
the taps there and the anchor's embedding say of the target's next hidden states. That
part is solved for here instead of descended to. In the order in which they act, the
maps that write to the residual stream become ridge regressions of what is still missing
of the target's last hidden state at each row:

    fc       the directions of the taps that tell most of the next hidden states
    q, k     fixed: of three heads one looks at the newest context row, one at the last
             few, one at the anchor
    v        a part of fc's directions for each layer and group
    o, down  regressions on what attention and gates give
    markov   the best correction of rank R by the previous token's embedding

On a mesh all devices add up a batch's moments; process 0 solves for the others.

Queries and keys have no bias, but their inputs have a direction along which all rows of
a kind are nearly equal: a rank-one map of it serves as one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from scipy.optimize import linprog

from jaxspark.drafters import DSparkDrafter
from jaxspark.drafters.heads import MarkovHead
from jaxspark.models import TargetDecoder
from jaxspark.parallel.agreement import agreed
from jaxspark.parallel.mesh import read
from jaxspark.parallel.rows import from_own_rows
from jaxspark.settings import random_key, standard_settings
from jaxspark.training.blocks import Blocks, sample_blocks, take_places
from jaxspark.training.data.packing import Packed
from jaxspark.training.features import Features, with_features
from jaxspark.training.forward import DraftVocabulary, by_row, target_rows
from jaxspark.training.forward_dspark import BlockInputs
from jaxspark.training.objective import DSPARK
from jaxspark.training.regression import (
    Regression,
    leading_directions,
    logit_metric,
    low_rank,
)

# Norm weights of queries and keys: logits of attention reach sqrt(H) times the square.
SHARPNESS = 2.5
# Size of the random part of queries and keys relative to the fixed one.
RANDOM_QK = 0.15
# How steeply "the last few" fade, relative to "the newest".
SOFTNESS = 0.15
# What all gates of an MLP have in common: a unit starts nearly linear.
GATE = 1.0
# Exponent of a direction's importance in its size among the context features.
EMPHASIS = 0.5
# Size of the random part of a sequential head's gates.
RANDOM_GATES = 0.1
# Batches that show what all rows of a kind have in common.
BATCHES_FOR_KINDS = 8


@dataclass(frozen=True)
class View:
    """What regressions are made of: one batch as the drafter sees it so far.

    Rows C are those that predict, by place in the block.
    """

    drafter: DSparkDrafter
    target: TargetDecoder
    batch: Packed
    features: Features
    blocks: Blocks

    @cached_property
    def inputs(self) -> BlockInputs:
        """Inputs of the draft layers."""
        return BlockInputs.of(
            self.drafter, self.target, self.batch, self.features, self.blocks
        )

    @cached_property
    def wanted(self) -> tuple[Float[Array, "C D"], Float[Array, " C"]]:
        """The target's last hidden states, without their norm's weight, and weights."""
        hidden_GND, _ = target_rows(self.features, self.blocks)
        scale_D = self.target.norm.weight[...].astype(jnp.float32)
        y_GND = hidden_GND.astype(jnp.float32) / scale_D
        weight_GN = DSPARK.weights(by_row(self.blocks.valid_PAG))
        return y_GND.reshape(-1, len(scale_D)), weight_GN.ravel()

    def predicting(self, x_RX: Float[Array, "R X"]) -> Float[Array, "C X"]:
        """The rows that predict."""
        P, A, G = self.blocks.labels_PAG.shape
        x_NQX = x_RX.reshape(P * A, -1, x_RX.shape[1])
        return jnp.moveaxis(x_NQX[:, -G:], 1, 0).reshape(-1, x_RX.shape[1])

    def rows(self, depth: int) -> Float[Array, "R D"]:
        """The residual stream after `depth` layers."""
        return self.inputs.rows(self.drafter.layers[:depth])

    def attended(self, depth: int) -> Float[Array, "R D"]:
        """The residual stream after the attention of the next layer."""
        x_RD, layer = self.rows(depth), self.drafter.layers[depth]
        return x_RD + layer.self_attn.o_proj(self.inputs.attend(layer, x_RD))

    def residual(self, input_RX, x_RD):
        """A map's inputs, what the stream lacks, and weights."""
        y_CD, weight_C = self.wanted
        return self.predicting(input_RX), y_CD - self.predicting(x_RD), weight_C

    def of_fc(self):
        """Taps before the anchor and the anchor itself; all rows' hidden states."""
        y_CD, weight_C = self.wanted
        blocks, G = self.blocks, self.blocks.labels_PAG.shape[-1]
        before_PA = jnp.maximum(blocks.anchors_PA - 1, 0)
        taps_PAmD = take_places(jnp.asarray(self.features.taps_PSmD), before_PA)
        anchor_ND = self.target.embed(blocks.previous_PAG[..., 0].ravel())
        N = len(anchor_ND)
        x_NI = jnp.concatenate([taps_PAmD.reshape(N, -1), anchor_ND], axis=1)
        fade_G = DSPARK.weights(jnp.ones((G, 1), bool))
        y_GND = y_CD.reshape(G, N, -1) * jnp.sqrt(fade_G)[:, None]
        whole_N = weight_C[-N:] > 0
        y_NX = jnp.moveaxis(y_GND, 0, 1).reshape(N, -1)
        return x_NI.astype(jnp.float32), y_NX, whole_N

    def of_kinds(self, depth: int):
        """A layer's inputs; whether each is a context row, an anchor or a mask."""
        context_TD = self.inputs.context_TD
        normed_RD = self.drafter.layers[depth].input_layernorm(self.rows(depth))
        T, R, Q = len(context_TD), len(normed_RD), len(self.inputs.seen_QQ)
        real_T = (jnp.asarray(self.batch.documents_PS) >= 0).ravel()
        anchor_R = jnp.arange(R) % Q == 0
        context_X = jnp.arange(T + R) < T
        anchor_X = jnp.concatenate([jnp.zeros(T, bool), anchor_R])
        kind_X3 = jnp.stack([context_X, anchor_X, ~context_X & ~anchor_X], axis=1)
        # All three kinds weigh the same.
        weight_R = jnp.where(anchor_R, 1, 1 / max(Q - 1, 1))
        weight_X = jnp.concatenate([real_T * (R / Q / T), weight_R])
        inputs_XD = jnp.concatenate([context_TD, normed_RD])
        return inputs_XD, kind_X3.astype(jnp.float32), weight_X

    def of_attention(self, depth: int):
        """Outputs of a layer's heads; what is missing without them."""
        x_RD = self.rows(depth)
        return self.residual(self.inputs.attend(self.drafter.layers[depth], x_RD), x_RD)

    def of_constant(self, depth: int):
        """Inputs of a layer's MLP; one."""
        layer = self.drafter.layers[depth]
        normed_RD = layer.post_attention_layernorm(self.attended(depth))
        one_R = jnp.ones(len(normed_RD))
        return normed_RD, one_R[:, None], one_R

    def of_mlp(self, depth: int):
        """Gated hidden units of a layer's MLP; what is missing without them."""
        x_RD, layer = self.attended(depth), self.drafter.layers[depth]
        h_RF = layer.mlp.hidden(layer.post_attention_layernorm(x_RD))
        return self.residual(h_RF, x_RD)

    def of_end(self):
        """Normed rows and the previous token's embedding; the hidden states."""
        x_RD = self.rows(len(self.drafter.layers))
        x_RD *= jax.lax.rsqrt(jnp.mean(jnp.square(x_RD), axis=1, keepdims=True))
        embedded_CD = self.target.embed(by_row(self.blocks.previous_PAG).ravel())
        x_CI = jnp.concatenate([self.predicting(x_RD), embedded_CD], axis=1)
        return x_CI.astype(jnp.float32), *self.wanted


@standard_settings()
def fit(
    drafter: DSparkDrafter,
    target: TargetDecoder,
    samples: Sequence[Packed],
    source: Callable[[Packed], Features],
    *,
    block_length: int,
    anchors: int = 64,
    seed: int = 0,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> None:
    """Gives a drafter its start, in place.

    Args:
      drafter: DSpark or DFlash, random but for its draft vocabulary.
      target: its target.
      samples: batches of packed sequences. The moments take 8 (m + 1)^2 D^2 bytes for
        m taps, and solving them some times more.
      source: their features.
      block_length: rows per block.
      anchors: blocks per sequence.
      seed: of the anchors.
      on_stage: called with the name of what is fitted next.

    Raises:
      ValueError: the drafter or the samples are too small for it.
    """
    check(drafter, samples)
    vocabulary = DraftVocabulary.of(drafter, target)
    draftable_V = vocabulary.draftable_V

    @partial(jax.jit, static_argnames=("look", "depth"))
    def see(drafter, target, draftable_V, key, batch, features, look, depth):
        blocks = sample_blocks(
            key,
            batch,
            anchors=anchors,
            block_length=block_length,
            draftable_V=draftable_V,
        )
        view = View(drafter, target, batch, features, blocks)
        return look(view) if depth is None else look(view, depth)

    def regress(stage: str, look, depth=None, *, most: int | None = None) -> Regression:
        on_stage(stage)
        result = Regression()
        for number, batch in enumerate(samples[:most]):
            rows = from_own_rows(with_features(batch, source))
            key = jax.random.fold_in(random_key(seed), number)
            seen = see(drafter, target, draftable_V, key, *rows, look, depth)
            result.add(*seen)
        return result

    scale_D = read(target.norm.weight[...]).astype(np.float32)
    scaled_WD = read(vocabulary.head_WD).astype(np.float32) * scale_D
    metric_DD = logit_metric(scaled_WD)
    put(drafter.norm.weight, scale_D)
    first, width = regress("fc", View.of_fc), drafter.fc.weight.shape[1]
    if not first.xx.any():
        raise ValueError(
            f"no answer is longer than a block of {block_length}; a least-squares "
            "start needs whole blocks"
        )
    put(
        drafter.fc.weight,
        leading_directions(first, width, metric_DD, emphasis=EMPHASIS),
    )
    for depth, layer in enumerate(drafter.layers):
        name = f"layer {depth}"
        kinds = regress(
            f"{name}: where to look", View.of_kinds, depth, most=BATCHES_FOR_KINDS
        )
        aim(drafter, depth, kinds.solve(), block_length)
        attention = regress(f"{name}: attention", View.of_attention, depth)
        put(layer.self_attn.o_proj.weight, attention.solve())
        constant = regress(
            f"{name}: gates", View.of_constant, depth, most=BATCHES_FOR_KINDS
        )
        gate = layer.mlp.gate_proj.weight
        put(gate, gate[...] + GATE * constant.solve())
        put(
            layer.mlp.down_proj.weight,
            regress(f"{name}: mlp", View.of_mlp, depth).solve(),
        )

    end, D = regress("norm and sequential head", View.of_end), len(scale_D)
    # One-parameter least squares: an average of hidden states has a smaller norm than
    # its members.
    shrink = np.trace(end.xy[:D]) / np.trace(end.xx[:D, :D])
    put(drafter.norm.weight, shrink * scale_D)
    if drafter.markov_head is not None:
        rest = Regression(end.xx[D:, D:], end.xy[D:] - shrink * end.xx[D:, :D])
        left_DR, right_DR = low_rank(rest, metric_DD, drafter.markov_head.rank)
        w1_VR = read(target.embed_tokens.weight[...]).astype(np.float32) @ right_DR
        start_head(drafter.markov_head, w1_VR, scaled_WD @ left_DR)


def check(drafter: DSparkDrafter, samples: Sequence[Packed]) -> None:
    """Raises `ValueError` for what cannot be fitted."""
    config = drafter.config.backbone
    if config.head_dim < 8:
        raise ValueError(
            "a least-squares start needs heads of width 8 or more, got "
            f"{config.head_dim}"
        )
    if drafter.config.markov_rank > config.hidden_size:
        raise ValueError(
            f"markov_rank {drafter.config.markov_rank} is more than the width "
            f"{config.hidden_size}"
        )
    if not samples:
        raise ValueError("a least-squares start needs a batch of sequences, got none")


def put(variable: nnx.Variable, value) -> None:
    """Replaces a variable's numbers, not its type; on all processes by the same."""
    variable[...] = jnp.asarray(agreed(np.asarray(value)), variable.dtype)


def start_head(head: MarkovHead, w1_VR: np.ndarray, w2_WR: np.ndarray) -> None:
    """Gives a sequential head the bias w2 w1[y], nearly if it is not linear."""
    size, R = np.sqrt(np.mean(np.square(w1_VR))), head.rank
    put(head.markov_w1.weight, w1_VR / size)
    # A gate near one half passes half; so does tanh of half the embedding.
    put(head.markov_w2.weight, w2_WR * size * (1 if head.kind == "vanilla" else 2))
    if head.kind == "gated":
        put(head.gate_proj.weight, RANDOM_GATES * head.gate_proj.weight[...])
    if head.kind == "rnn":
        weight = head.joint_proj.weight
        output_RI = RANDOM_GATES * weight[2 * R :]
        output_RI = output_RI.at[:, R : 2 * R].add(np.eye(R) / 2)
        put(weight, jnp.concatenate([weight[: 2 * R], output_RI]))


def fading(
    frequencies: Float[np.ndarray, " f"], places: int, far: int = 2048
) -> Float[np.ndarray, " f"]:
    """Weights a of a score sum_i a_i cos(f_i d) that prefers the nearest place.

    The score falls over d = 1 ... places, and stays below from there to `far`. Among
    weights that are not negative and add up to one these fall by the widest margin,
    three times as wide from a few places further on.
    """
    wave = np.cos(np.outer(np.arange(far + 1), frequencies))
    near = wave[1:places] - wave[2 : places + 1]
    beyond = wave[places] - wave[places + 1 :]
    margins = [np.ones(len(near)), np.minimum(np.arange(len(beyond)) + 1, 3)]
    drop = np.column_stack([np.concatenate([near, beyond]), -np.concatenate(margins)])
    count = len(frequencies)
    found = linprog(
        np.append(np.zeros(count), -1),
        A_ub=-drop,
        b_ub=np.zeros(len(drop)),
        A_eq=np.append(np.ones(count), 0)[None],
        b_eq=[1],
        bounds=[(0, None)] * count + [(None, None)],
    )
    return np.maximum(found.x[:count], 0)


def aim(
    drafter: DSparkDrafter,
    depth: int,
    kind_3D: Float[np.ndarray, "3 D"],
    block_length: int,
) -> None:
    """Fixes where a layer's heads look, and which directions they carry over."""
    config = drafter.config.backbone
    N, K, H, D = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.hidden_size,
    )
    attention = drafter.layers[depth].self_attn
    context_D, anchor_D, mask_D = kind_3D
    half = H // 2
    # The slowest two frequencies hardly turn: their dimensions tell kinds apart.
    frequencies, _ = config.rope.frequencies(H)
    newest_H = np.zeros(H)
    # The newest context row is j + 1 places from row j.
    newest_H[: half - 2] = np.sqrt(fading(frequencies[: half - 2], block_length))
    is_anchor_H, is_mask_H, none_H = np.eye(H)[[half - 1, H - 1, half - 2]]
    recent_H = SOFTNESS * newest_H + np.sqrt(1 - SOFTNESS**2) * none_H
    looks_3H = [newest_H, recent_H, is_anchor_H]
    key_HD = (
        np.outer(newest_H, context_D)
        + np.outer(is_anchor_H, anchor_D)
        + np.outer(is_mask_H, mask_D)
    )
    # Heads of a group share values: where there are three, they share out the looks.
    group = N // K if N // K >= 3 else N
    q_ND = np.concatenate(
        [np.outer(looks_3H[n % group % 3], anchor_D + mask_D) for n in range(N)]
    )
    k_KD = np.tile(key_HD, (K, 1))
    for projection, fixed in ((attention.q_proj, q_ND), (attention.k_proj, k_KD)):
        weight = projection.weight
        put(weight, RANDOM_QK * weight[...] + H**0.5 * fixed)
    for norm in (attention.q_norm, attention.k_norm):
        if norm is not None:
            put(norm.weight, np.full(H, SHARPNESS))
    first = depth * K * H
    chosen = (first + np.arange(K * H)) % D
    put(attention.v_proj.weight, np.eye(D)[chosen])
