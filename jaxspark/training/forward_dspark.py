"""Draft blocks of packed sequences, in parallel and with gradients.

The same parameters as `DSparkDrafter.propose`, but many blocks of a sequence share one
pass: context keys and values are computed once per position, a block sees those before
its anchor and its own rows. Heads are told the true earlier tokens (teacher forcing).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxspark.drafters.dspark import DSparkDrafter
from jaxspark.models.layers.rope import Rotation
from jaxspark.training.blocks import Blocks, block_attention, seen_context
from jaxspark.training.data.packing import Packed
from jaxspark.training.features import Features
from jaxspark.training.forward import DraftVocabulary, by_row, objective_sums
from jaxspark.training.objective import Objective, Sums


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
    hidden_PAGD = backbone(drafter, target, batch, features, blocks)
    P, A, G, D = hidden_PAGD.shape
    hidden_GND = jnp.moveaxis(hidden_PAGD.reshape(P * A, G, D), 1, 0)

    def row(state_NR, inputs):
        hidden_ND, previous_N = inputs
        state_NR, *outputs = drafter.step(state_NR, previous_N, hidden_ND)
        return state_NR, outputs

    head = drafter.markov_head
    start = () if head is None else head.start(P * A)
    inputs = (hidden_GND, by_row(blocks.previous_PAG))
    _, (latent_GNR, confidence_GN) = jax.lax.scan(row, start, inputs)
    return objective_sums(
        objective,
        vocabulary,
        features,
        blocks,
        hidden_GND,
        confidence_GN,
        latent_GNR,
        None if head is None else head.markov_w2.weight[...],
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockInputs:
    """What the draft layers read: R = P A Q block rows and T = P S context rows."""

    x_RD: Float[Array, "R D"]
    context_TD: Float[Array, "T D"]
    block_rotation: Rotation
    context_rotation: Rotation
    seen_PAS: Bool[Array, "P A S"]
    seen_QQ: Bool[Array, "Q Q"]

    @classmethod
    def of(
        cls,
        drafter: DSparkDrafter,
        target,
        batch: Packed,
        features: Features,
        blocks: Blocks,
    ) -> "BlockInputs":
        """Embedded anchors and masks, and the context features of all positions."""
        config = drafter.config
        P, A, G = blocks.labels_PAG.shape
        rows = G + (not config.sample_from_anchor)
        positions_PS = jnp.asarray(batch.positions_PS)
        anchor_PA = jnp.take_along_axis(positions_PS, blocks.anchors_PA, axis=1)

        def rotation(positions):
            c = config.backbone
            return Rotation.at(c.rope, c.head_dim, positions.reshape(-1))

        masks = jnp.full((P, A, rows - 1), config.mask_token_id, jnp.int32)
        ids_PAQ = jnp.concatenate([blocks.previous_PAG[..., :1], masks], axis=-1)
        return cls(
            x_RD=target.embed(ids_PAQ.reshape(-1)).astype(drafter.dtype),
            context_TD=drafter.context(features.taps_TmD(drafter.dtype)),
            block_rotation=rotation(anchor_PA[..., None] + jnp.arange(rows)),
            context_rotation=rotation(positions_PS),
            seen_PAS=seen_context(batch, blocks.anchors_PA, blocks.anchors_PA),
            seen_QQ=jnp.ones((rows, rows), bool),
        )

    def attend(self, layer, x_RD: Float[Array, "R D"]) -> Float[Array, "R X"]:
        """Outputs of a layer's heads, before its output map."""
        attention = layer.self_attn
        normed_RD = layer.input_layernorm(x_RD)
        return block_attention(
            attention.queries(normed_RD, self.block_rotation),
            attention.keys_values(self.context_TD, self.context_rotation),
            attention.keys_values(normed_RD, self.block_rotation),
            self.seen_PAS,
            self.seen_QQ,
        )

    def rows(self, layers) -> Float[Array, "R D"]:
        """The residual stream after some layers."""
        x_RD = self.x_RD
        for layer in layers:
            x_RD = self.layer(layer, x_RD)
        return x_RD

    def layer(self, layer, x_RD: Float[Array, "R D"]) -> Float[Array, "R D"]:
        """A whole layer."""
        return layer.after_attention(
            x_RD, layer.self_attn.o_proj(self.attend(layer, x_RD))
        )


def backbone(
    drafter: DSparkDrafter, target, batch: Packed, features: Features, blocks: Blocks
) -> Float[Array, "P A G D"]:
    """Normed hidden states of all predicting rows."""
    P, A, G = blocks.labels_PAG.shape
    inputs = BlockInputs.of(drafter, target, batch, features, blocks)
    x_RD = inputs.rows(drafter.layers)
    return drafter.norm(x_RD).reshape(P, A, len(inputs.seen_QQ), -1)[:, :, -G:]
