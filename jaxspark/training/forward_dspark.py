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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockInputs:
    """What the draft layers read: R = P A Q block rows and T = P S context rows."""

    x_DR: Float[Array, "D R"]
    context_DT: Float[Array, "D T"]
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
            x_DR=target.embed(ids_PAQ.reshape(-1)).astype(drafter.dtype),
            context_DT=drafter.context(features.taps_mDT(drafter.dtype)),
            block_rotation=rotation(anchor_PA[..., None] + jnp.arange(rows)),
            context_rotation=rotation(positions_PS),
            seen_PAS=seen_context(batch, blocks.anchors_PA, blocks.anchors_PA),
            seen_QQ=jnp.ones((rows, rows), bool),
        )

    def attend(self, layer, x_DR: Float[Array, "D R"]) -> Float[Array, "X R"]:
        """Outputs of a layer's heads, before its output map."""
        attention = layer.self_attn
        normed_DR = layer.input_layernorm(x_DR)
        return block_attention(
            attention.queries(normed_DR, self.block_rotation),
            attention.keys_values(self.context_DT, self.context_rotation),
            attention.keys_values(normed_DR, self.block_rotation),
            self.seen_PAS,
            self.seen_QQ,
        )

    def rows(self, layers) -> Float[Array, "D R"]:
        """The residual stream after some layers."""
        x_DR = self.x_DR
        for layer in layers:
            x_DR = self.layer(layer, x_DR)
        return x_DR

    def layer(self, layer, x_DR: Float[Array, "D R"]) -> Float[Array, "D R"]:
        """A whole layer."""
        return layer.finish(x_DR, layer.self_attn.o_proj(self.attend(layer, x_DR)))


def backbone(
    drafter: DSparkDrafter, target, batch: Packed, features: Features, blocks: Blocks
) -> Float[Array, "D P A G"]:
    """Normed hidden states of all predicting rows."""
    P, A, G = blocks.labels_PAG.shape
    inputs = BlockInputs.of(drafter, target, batch, features, blocks)
    x_DR = inputs.rows(drafter.layers)
    return drafter.norm(x_DR).reshape(-1, P, A, len(inputs.seen_QQ))[..., -G:]
