"""Draft blocks of packed sequences, in parallel and with gradients.

The same parameters as `DSparkDrafter.propose`, but many blocks of a sequence share one
pass: context keys and values are computed once per position, a block sees those before
its anchor and its own rows. Heads are told the true earlier tokens (teacher forcing).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jaxspark.drafters.dspark import DSparkDrafter
from jaxspark.models.layers.rope import Rotation
from jaxspark.training.blocks import Blocks, block_attention, seen_context, take_places
from jaxspark.training.data.packing import Packed
from jaxspark.training.features import Features
from jaxspark.training.objective import Objective, Sums, reduce_terms
from jaxspark.training.vocabulary_loss import vocabulary_terms


@dataclass(frozen=True)
class DraftVocabulary:
    """The rows of the head that a drafter uses, and where tokens are among them."""

    head_WD: Float[Array, "W D"]
    place_V: Int[Array, " V"] | None

    @classmethod
    def of(cls, drafter, target) -> "DraftVocabulary":
        """Place W stands for tokens that cannot be drafted."""
        if drafter.draft_ids is None:
            return cls(target.head_VD, None)
        ids_W = drafter.draft_ids[...]
        W = ids_W.shape[0]
        place_V = jnp.full((target.config.vocab_size,), W, jnp.int32)
        place_V = place_V.at[ids_W].set(jnp.arange(W, dtype=jnp.int32))
        return cls(drafter.lm_head.weight[...], place_V)

    @property
    def draftable_V(self):
        """Which tokens can be drafted; None for all."""
        if self.place_V is None:
            return None
        return self.place_V < self.head_WD.shape[0]

    def places(self, ids: Int[Array, "..."]) -> Int[Array, "..."]:
        """Where tokens stand in the draft vocabulary."""
        return ids if self.place_V is None else self.place_V[ids]


def dspark_sums(
    drafter: DSparkDrafter,
    target,
    batch: Packed,
    features: Features,
    blocks: Blocks,
    vocabulary: DraftVocabulary,
    objective: Objective,
) -> Sums:
    """The objective's sums for a drafter's blocks."""
    hidden_DPAG = backbone(drafter, target, batch, features, blocks)
    D, P, A, G = hidden_DPAG.shape
    hidden_GDN = jnp.moveaxis(hidden_DPAG.reshape(D, P * A, G), 2, 0)

    def row(state_RN, inputs):
        hidden_DN, previous_N = inputs
        state_RN, *outputs = drafter.step(state_RN, previous_N, hidden_DN)
        return state_RN, outputs

    head = drafter.markov_head
    start = () if head is None else head.start(P * A)
    inputs = (hidden_GDN, by_row(blocks.previous_PAG))
    _, (latent_GRN, confidence_GN) = jax.lax.scan(row, start, inputs)
    return objective_sums(
        objective,
        vocabulary,
        features,
        blocks,
        hidden_GDN,
        confidence_GN,
        latent_GRN,
        None if head is None else head.markov_w2.weight[...],
    )


def by_row(x_PAG: Shaped[Array, "P A G"]) -> Shaped[Array, "G N"]:
    """Rows of the blocks first, then all N = P * A blocks."""
    return jnp.moveaxis(x_PAG.reshape(-1, x_PAG.shape[-1]), 1, 0)


def objective_sums(
    objective: Objective,
    vocabulary: DraftVocabulary,
    features: Features,
    blocks: Blocks,
    hidden_GDN: Float[Array, "G D N"],
    confidence_GN: Float[Array, "G N"],
    latent_GRN: Float[Array, "G R N"] | None = None,
    w2_WR: Float[Array, "W R"] | None = None,
) -> Sums:
    """The objective's sums, given what a drafter says of its rows."""
    valid_GN = by_row(blocks.valid_PAG)
    target_GDN, log_z_GN = target_rows(features, blocks)
    numerator, terms_GN = vocabulary_terms(
        objective,
        hidden_GDN,
        latent_GRN,
        w2_WR,
        vocabulary.head_WD,
        target_GDN,
        log_z_GN,
        by_row(vocabulary.places(blocks.labels_PAG)),
        objective.weights(valid_GN),
    )
    return reduce_terms(numerator, terms_GN, confidence_GN, valid_GN, objective)


def target_rows(
    features: Features, blocks: Blocks
) -> tuple[Float[Array, "G D N"], Float[Array, "G N"]]:
    """Last hidden states and log Z of all rows of N = P * A blocks.

    Gathered once; logits over the vocabulary are made row by row.
    """
    P, A, G = blocks.labels_PAG.shape
    places_PR = blocks.places_PAG.reshape(P, A * G)
    hidden_PRD = take_places(jnp.asarray(features.hidden_PSD), places_PR)
    log_z_PR = take_places(jnp.asarray(features.log_z_PS), places_PR)
    hidden_NGD = hidden_PRD.reshape(P * A, G, -1)
    return jnp.transpose(hidden_NGD, (1, 2, 0)), log_z_PR.reshape(P * A, G).T


def backbone(
    drafter: DSparkDrafter, target, batch: Packed, features: Features, blocks: Blocks
) -> Float[Array, "D P A G"]:
    """Normed hidden states of all predicting rows."""
    config = drafter.config
    P, A, G = blocks.labels_PAG.shape
    rows = G + (not config.sample_from_anchor)
    positions_PS = jnp.asarray(batch.positions_PS)

    def rotation(positions):
        c = config.backbone
        return Rotation.at(c.rope, c.head_dim, positions.reshape(-1))

    taps_XT = jnp.moveaxis(features.taps_PSmD.astype(drafter.dtype), (2, 3), (0, 1))
    context_DT = drafter.context(taps_XT.reshape(*taps_XT.shape[:2], -1))
    context_rotation = rotation(positions_PS)

    anchor_PA = jnp.take_along_axis(positions_PS, blocks.anchors_PA, axis=1)
    block_rotation = rotation(anchor_PA[..., None] + jnp.arange(rows))
    masks = jnp.full((P, A, rows - 1), config.mask_token_id, jnp.int32)
    ids_PAQ = jnp.concatenate([blocks.previous_PAG[..., :1], masks], axis=-1)
    x_DR = target.embed(ids_PAQ.reshape(-1)).astype(drafter.dtype)

    seen_PAS = seen_context(batch, blocks.anchors_PA, blocks.anchors_PA)
    seen_QQ = jnp.ones((rows, rows), bool)

    for layer in drafter.layers:
        attention = layer.self_attn
        normed_DR = layer.input_layernorm(x_DR)
        o_XR = block_attention(
            attention.queries(normed_DR, block_rotation),
            attention.keys_values(context_DT, context_rotation),
            attention.keys_values(normed_DR, block_rotation),
            seen_PAS,
            seen_QQ,
        )
        x_DR = x_DR + attention.o_proj(o_XR)
        x_DR = x_DR + layer.mlp(layer.post_attention_layernorm(x_DR))
    hidden_DPAQ = drafter.norm(x_DR).reshape(-1, P, A, rows)
    return hidden_DPAQ[..., rows - G :]
