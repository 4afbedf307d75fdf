"""Eagle3's training-time test: G steps on its own outputs, many anchors at once.

Step 0 pairs the anchor's token with the target's feature before it; step j pairs the
true token at a + j with the layer's own output of step j - 1, as drafting does. Earlier
pairs are the target's, so their keys and values are computed once per position.
"""

import jax
import jax.numpy as jnp

from jaxspark.drafters.eagle3 import Eagle3Drafter
from jaxspark.training.blocks import Blocks, block_attention, seen_context, take_places
from jaxspark.training.data.packing import Packed
from jaxspark.training.features import Features
from jaxspark.training.forward import DraftVocabulary, by_row, objective_sums
from jaxspark.training.objective import Objective, Sums


def eagle3_sums(
    drafter: Eagle3Drafter,
    target,
    batch: Packed,
    features: Features,
    blocks: Blocks,
    vocabulary: DraftVocabulary,
    objective: Objective,
) -> Sums:
    """The objective's sums for a drafter's blocks."""
    P, A, G = blocks.labels_PAG.shape
    D = target.config.hidden_size
    layer = drafter.layers[0]
    positions_PS = jnp.asarray(batch.positions_PS)
    ids_PS = jnp.asarray(batch.ids_PS)

    feature_TD = drafter.features(features.taps_TmD(drafter.dtype))
    following_T = jnp.roll(ids_PS, -1, axis=1).reshape(-1)
    pair_TI = layer.pair(target.embed(following_T).astype(drafter.dtype), feature_TD)
    context = layer.self_attn.keys_values(
        pair_TI, drafter.rotation(positions_PS.reshape(-1))
    )
    anchor_PA = jnp.take_along_axis(positions_PS, blocks.anchors_PA, axis=1)
    # The pair before the anchor is the block's own first row.
    newest_PA = jnp.maximum(anchor_PA - 1, 0)
    seen_PAS = seen_context(batch, blocks.anchors_PA, blocks.anchors_PA - 1)
    feature_PSD = feature_TD.reshape(*positions_PS.shape, D)
    first_PAD = take_places(feature_PSD, jnp.maximum(blocks.anchors_PA - 1, 0))
    first_PAD = jnp.where((anchor_PA > 0)[..., None], first_PAD, 0)

    def step(carry, inputs):
        feature_ND, k_NGKH, v_NGKH = carry
        j, token_N = inputs
        embedded_ND = target.embed(token_N).astype(drafter.dtype)
        pair_NI = layer.pair(embedded_ND, feature_ND)
        rotation = drafter.rotation(newest_PA.reshape(-1) + j)
        k_NKH, v_NKH = layer.self_attn.keys_values(pair_NI, rotation)
        is_mine_G11 = (jnp.arange(G) == j)[:, None, None]
        k_NGKH = jnp.where(is_mine_G11, k_NKH[:, None], k_NGKH)
        v_NGKH = jnp.where(is_mine_G11, v_NKH[:, None], v_NGKH)
        o_NX = block_attention(
            layer.self_attn.queries(pair_NI, rotation),
            context,
            (k_NGKH, v_NGKH),
            seen_PAS,
            (jnp.arange(G) <= j)[None],
        )
        attended_ND = layer.self_attn.o_proj(o_NX)
        hidden_ND, feature_ND = drafter.output(
            layer.after_attention(feature_ND, attended_ND)
        )
        return (feature_ND, k_NGKH, v_NGKH), hidden_ND

    attention = layer.self_attn
    empty = jnp.zeros((P * A, G, attention.kv_heads, attention.head_dim), drafter.dtype)
    start = (first_PAD.reshape(P * A, D), empty, empty)
    inputs = (jnp.arange(G), by_row(blocks.previous_PAG))
    _, hidden_GND = jax.lax.scan(step, start, inputs)
    no_confidence_GN = jnp.zeros((G, P * A), jnp.float32)
    return objective_sums(
        objective, vocabulary, features, blocks, hidden_GND, no_confidence_GN
    )
