"""What the forward passes of all drafters share: from rows of blocks to the objective.

Arrays are [G, ..., N]: rows of the blocks first, then all N = P * A blocks of a batch.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jaxspark.training.blocks import Blocks, take_places
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


def by_row(x_PAG: Shaped[Array, "P A G"]) -> Shaped[Array, "G N"]:
    """Rows of the blocks first, then all N = P * A blocks."""
    return jnp.moveaxis(x_PAG.reshape(-1, x_PAG.shape[-1]), 1, 0)


def objective_sums(
    objective: Objective,
    vocabulary: DraftVocabulary,
    features: Features,
    blocks: Blocks,
    hidden_GND: Float[Array, "G N D"],
    confidence_GN: Float[Array, "G N"],
    latent_GNR: Float[Array, "G N R"] | None = None,
    w2_WR: Float[Array, "W R"] | None = None,
) -> Sums:
    """The objective's sums, given what a drafter says of its rows."""
    valid_GN = by_row(blocks.valid_PAG)
    target_GND, log_z_GN = target_rows(features, blocks)
    numerator, terms_GN = vocabulary_terms(
        objective,
        hidden_GND,
        latent_GNR,
        w2_WR,
        vocabulary.head_WD,
        target_GND,
        log_z_GN,
        by_row(vocabulary.places(blocks.labels_PAG)),
        objective.weights(valid_GN),
    )
    return reduce_terms(numerator, terms_GN, confidence_GN, valid_GN, objective)


def target_rows(
    features: Features, blocks: Blocks
) -> tuple[Float[Array, "G N D"], Float[Array, "G N"]]:
    """Last hidden states and log Z of all rows of N = P * A blocks.

    Gathered once; logits over the vocabulary are made row by row.
    """
    P, A, G = blocks.labels_PAG.shape
    places_PR = blocks.places_PAG.reshape(P, A * G)
    hidden_PRD = take_places(jnp.asarray(features.hidden_PSD), places_PR)
    log_z_PR = take_places(jnp.asarray(features.log_z_PS), places_PR)
    hidden_NGD = hidden_PRD.reshape(P * A, G, -1)
    return jnp.swapaxes(hidden_NGD, 0, 1), log_z_PR.reshape(P * A, G).T
