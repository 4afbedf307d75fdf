"""Anchors and their blocks in packed sequences.

An anchor is an answer token whose next token is part of the answer too. Its block has
G rows; row j knows the tokens up to a + j and predicts the one at a + 1 + j. A row
counts only while every row before it counts: its label lies in the same document, is
trainable, and all labels before it can be drafted.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxspark.training.data.packing import Packed


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Blocks:
    """A draft blocks in each of P sequences.

    Attributes:
      anchors_PA: place of each anchor in its sequence.
      previous_PAG: the tokens at a + j, which row j is told.
      labels_PAG: the tokens at a + 1 + j, which it has to predict.
      valid_PAG: whether the row counts.
    """

    anchors_PA: Int[Array, "P A"]
    previous_PAG: Int[Array, "P A G"]
    labels_PAG: Int[Array, "P A G"]
    valid_PAG: Bool[Array, "P A G"]

    @property
    def places_PAG(self) -> Int[Array, "P A G"]:
        """Place a + j of each row, whose target logits predict the row's label."""
        return self.anchors_PA[..., None] + jnp.arange(self.labels_PAG.shape[-1])


def sample_blocks(
    key: Array,
    batch: Packed,
    *,
    anchors: int,
    block_length: int,
    draftable_V: Bool[Array, " V"] | None = None,
) -> Blocks:
    """Up to `anchors` blocks per sequence, anchors without replacement.

    Args:
      key: of the sampling.
      batch: packed sequences.
      anchors: A, blocks per sequence; a sequence with fewer anchors has empty ones.
      block_length: G.
      draftable_V: which tokens a pruned draft vocabulary holds; None: all.
    """
    trainable_PS = jnp.asarray(batch.trainable_PS)
    documents_PS = jnp.asarray(batch.documents_PS)
    P, S = trainable_PS.shape
    anchors = min(anchors, S)
    following_PS = jnp.roll(trainable_PS, -1, axis=1).at[:, -1].set(False)
    following_PS &= jnp.roll(documents_PS, -1, axis=1) == documents_PS
    candidate_PS = trainable_PS & following_PS
    score_PS = jnp.where(candidate_PS, jax.random.uniform(key, (P, S)), -1.0)
    chosen_PA, anchors_PA = jax.lax.top_k(score_PS, anchors)

    place_PAQ = anchors_PA[..., None] + jnp.arange(block_length + 1)
    inside_PAQ = place_PAQ < S

    def at(values_PS):
        flat_PX = jnp.minimum(place_PAQ, S - 1).reshape(P, -1)
        return jnp.take_along_axis(values_PS, flat_PX, axis=1).reshape(place_PAQ.shape)

    ids_PAQ, documents_PAQ = at(jnp.asarray(batch.ids_PS)), at(documents_PS)
    valid_PAQ = inside_PAQ & at(trainable_PS) & (chosen_PA >= 0)[..., None]
    valid_PAQ &= documents_PAQ == documents_PAQ[..., :1]
    labels_PAG = ids_PAQ[..., 1:]
    valid_PAG = valid_PAQ[..., 1:]
    if draftable_V is not None:
        # Behind a token that cannot be drafted nothing is ever accepted.
        drafted_PAG = draftable_V[labels_PAG]
        before_PAG = jnp.roll(drafted_PAG, 1, axis=-1).at[..., 0].set(True)
        valid_PAG &= before_PAG
    return Blocks(
        anchors_PA=anchors_PA,
        previous_PAG=ids_PAQ[..., :-1],
        labels_PAG=labels_PAG,
        valid_PAG=jnp.cumprod(valid_PAG, axis=-1).astype(bool),
    )


def take_places(x_PSX: Float[Array, "P S *X"], places_PR: Int[Array, "P R"]) -> Array:
    """Entries of each sequence at some places; places past the end read the last."""
    last = x_PSX.shape[1] - 1
    return jax.vmap(lambda x_SX, places_R: x_SX[jnp.minimum(places_R, last)])(
        x_PSX, places_PR
    )


def seen_context(
    batch: Packed, anchors_PA: Int[Array, "P A"], ends_PA: Int[Array, "P A"]
) -> Bool[Array, "P A S"]:
    """Places before `ends_PA` in the anchor's own document."""
    documents_PS = jnp.asarray(batch.documents_PS)
    mine_PA = jnp.take_along_axis(documents_PS, anchors_PA, axis=1)
    seen_PAS = documents_PS[:, None] == mine_PA[..., None]
    return seen_PAS & (jnp.arange(documents_PS.shape[1]) < ends_PA[..., None])


def block_attention(
    q_RNH: Float[Array, "R N H"],
    context: tuple[Float[Array, "T K H"], Float[Array, "T K H"]],
    block: tuple[Float[Array, "*U K H"], Float[Array, "*U K H"]],
    seen_PAS: Bool[Array, "P A S"],
    seen_QU: Bool[Array, "Q U"],
) -> Float[Array, "R X"]:
    """Each block's Q queries attend to its visible context and to its own U rows.

    Args:
      q_RNH: queries, R = P * A * Q.
      context: keys and values of T = P * S context rows.
      block: keys and values of the blocks' rows, P * A * U of them.
      seen_PAS: context rows that a block sees.
      seen_QU: rows of its own block that a query sees.

    Returns:
      Outputs of all heads, X = N * H.
    """
    P, A, S = seen_PAS.shape
    Q, U = seen_QU.shape
    K, H = context[0].shape[1:]
    g = q_RNH.shape[1] // K
    einsum = _einsum(q_RNH.dtype)
    # Batch axes lead and one product covers all queries of a key/value head: XLA on
    # CPU takes twice as long over any other order.
    q_PXKgH = q_RNH.reshape(P, A * Q, K, g, H) * H**-0.5
    q_PKMH = jnp.transpose(q_PXKgH, (0, 2, 3, 1, 4)).reshape(P, K, g * A * Q, H)
    k_PKHS, v_PKHS = (
        jnp.transpose(x.reshape(P, S, K, H), (0, 2, 3, 1)) for x in context
    )
    k_PKAHU, v_PKAHU = (
        jnp.transpose(x.reshape(P, A, U, K, H), (0, 3, 1, 4, 2)) for x in block
    )

    def by_block(x_PKM: Shaped[Array, "P K M ..."]):
        """Rows of one block side by side: [P, K, A, g Q, ...]."""
        x = x_PKM.reshape(P, K, g, A, Q, *x_PKM.shape[3:])
        return jnp.moveaxis(x, 3, 2).reshape(P, K, A, g * Q, *x_PKM.shape[3:])

    def by_head(x_PKAX: Shaped[Array, "P K A X ..."]):
        """Back again."""
        x = x_PKAX.reshape(P, K, A, g, Q, *x_PKAX.shape[4:])
        return jnp.moveaxis(x, 2, 3).reshape(P, K, g * A * Q, *x_PKAX.shape[4:])

    floor = jnp.finfo(jnp.float32).min
    far = einsum("PKMH,PKHS->PKMS", q_PKMH, k_PKHS).reshape(P, K, g, A, Q, S)
    far = jnp.where(seen_PAS[:, None, None, :, None], far, floor)
    far = far.reshape(P, K, g * A * Q, S)
    near = by_head(einsum("PKAXH,PKAHU->PKAXU", by_block(q_PKMH), k_PKAHU))
    near = jnp.where(jnp.tile(seen_QU, (g * A, 1)), near, floor)
    # One softmax over both, without putting them side by side.
    best = jax.lax.stop_gradient(jnp.maximum(far.max(-1), near.max(-1)))[..., None]
    far, near = jnp.exp(far - best), jnp.exp(near - best)
    total = far.sum(-1, keepdims=True) + near.sum(-1, keepdims=True)
    far, near = far.astype(q_RNH.dtype), near.astype(q_RNH.dtype)
    o_PKMH = einsum("PKMS,PKHS->PKMH", far, v_PKHS)
    o_PKMH += by_head(einsum("PKAXU,PKAHU->PKAXH", by_block(near), v_PKAHU))
    o_PKgXH = (o_PKMH / total).reshape(P, K, g, A * Q, H)
    o_PXKgH = jnp.transpose(o_PKgXH, (0, 3, 1, 2, 4))
    return o_PXKgH.reshape(P * A * Q, -1).astype(q_RNH.dtype)


def packed_attention(
    q_TNH: Float[Array, "T N H"],
    k_TKH: Float[Array, "T K H"],
    v_TKH: Float[Array, "T K H"],
    seen_PSS: Bool[Array, "P S S"],
) -> Float[Array, "T X"]:
    """Attention within packed sequences, T = P * S.

    Args:
      q_TNH: queries.
      k_TKH: keys.
      v_TKH: values.
      seen_PSS: whether a row sees a row of its sequence.

    Returns:
      Outputs of all heads, X = N * H.
    """
    P, S, _ = seen_PSS.shape
    T, K, H = k_TKH.shape
    g = q_TNH.shape[1] // K
    einsum = _einsum(q_TNH.dtype)
    q_PSKgH = q_TNH.reshape(P, S, K, g, H) * H**-0.5
    q_PKMH = jnp.transpose(q_PSKgH, (0, 2, 3, 1, 4)).reshape(P, K, g * S, H)
    k_PKHS, v_PKHS = (
        jnp.transpose(x.reshape(P, S, K, H), (0, 2, 3, 1)) for x in (k_TKH, v_TKH)
    )
    scores = einsum("PKMH,PKHS->PKMS", q_PKMH, k_PKHS).reshape(P, K, g, S, S)
    scores = jnp.where(seen_PSS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_TKH.dtype)
    o_PKMH = einsum("PKMS,PKHS->PKMH", weights.reshape(P, K, g * S, S), v_PKHS)
    o_PSKgH = jnp.transpose(o_PKMH.reshape(P, K, g, S, H), (0, 3, 1, 2, 4))
    return o_PSKgH.reshape(T, -1).astype(q_TNH.dtype)


def _einsum(dtype):
    """Products that sum in float32, whole for float32 operands."""
    return partial(
        jnp.einsum,
        precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
