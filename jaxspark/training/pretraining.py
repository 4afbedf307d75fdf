"""Gradients of DeepSeek-V4's own training, on one device or on a mesh of them.

Texts are shared out over `data` and `expert`, experts over `expert`; tokens travel to
them as in decoding. Every other parameter, and the experts' along `data`, is kept in
shards too (FSDP; ZeRO-3, arXiv 1910.02054): a layer is gathered where it runs, on the
way back once more, and its gradient scattered as it is made. So a shard holds a whole
layer at a time, and its own part of all others.

The loss is a sum over texts divided by counts that all shards agree on, so the parts of
all shards add up to it, and so do their gradients.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxspark.drafters.mtp import MTPDrafter
from jaxspark.models import DeepSeekV4, FlatTokens
from jaxspark.models.deepseek_v4 import DeepSeekV4Layer
from jaxspark.parallel.axes import SLOTS, total
from jaxspark.parallel.mesh import mesh_in_use, place
from jaxspark.parallel.rules import (
    gather,
    path_name,
    replicated_specs,
    rule_for,
    training_specs,
    unused_slots,
)
from jaxspark.settings import standard_settings
from jaxspark.training.deepseek_v4 import LossWeights, Metrics, pretraining_loss

WEIGHTS = LossWeights()
# Where the target's layers are in a pair of models.
_LAYERS = "0.layers."


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Parts:
    """A target, or a target and its `MTPDrafter`, as training takes them apart.

    Attributes:
      trained: the parameters.
      fixed: arrays that no gradient reaches: routing tables, router biases.
      graph: what they are parts of.
    """

    trained: Any
    fixed: Any
    graph: Any = field(metadata={"static": True})

    @classmethod
    def of(cls, model: DeepSeekV4, mtp: MTPDrafter | None = None) -> "Parts":
        """Of models; on the mesh in use each parameter goes into its shards."""
        graph, trained, fixed = nnx.split((model, mtp), nnx.Param, ...)  # type: ignore[misc]
        trained = place(trained, training_specs)
        return cls(trained, place(fixed, replicated_specs), graph)

    def models(self) -> tuple[DeepSeekV4, MTPDrafter | None]:
        """The models again."""
        return nnx.merge(self.graph, self.trained, self.fixed)


@partial(jax.jit, static_argnames=("weights", "dense_index"))
@standard_settings()
def pretraining_gradients(
    parts: Parts,
    ids_BQ: Int[Array, "B Q"],
    counts_B: Int[Array, " B"],
    *,
    weights: LossWeights = WEIGHTS,
    dense_index: bool = False,
) -> tuple[Any, Float[Array, ""], Metrics]:
    """Gradients of the loss of B texts.

    Args:
      parts: of the models that are trained.
      ids_BQ: texts; anything past their ends. On a mesh B divides over slots' shards.
      counts_B: tokens of each.
      weights: of the terms beside the cross entropy.
      dense_index: see `deepseek_v4.forward`.

    Returns:
      Gradients, in the shards of the parameters; the loss; and what the step saw.
    """
    options = {"weights": weights, "dense_index": dense_index}
    if mesh_in_use() is None:
        whole = _Shards(replicated_specs(parts.trained))
        return _gradients(parts, ids_BQ, counts_B, shards=whole, options=options)
    stored = training_specs(parts.trained)
    specs = replace(parts, trained=stored, fixed=replicated_specs(parts.fixed))
    program = jax.shard_map(
        partial(_gradients, shards=_Shards(stored), options=options),
        in_specs=(specs, PartitionSpec(SLOTS), PartitionSpec(SLOTS)),
        out_specs=(stored, PartitionSpec(), PartitionSpec()),
        check_vma=False,
    )
    return program(parts, ids_BQ, counts_B)


def _gradients(parts, ids_BQ, counts_B, *, shards, options):
    """Of one shard's texts, summed with those of the others."""

    def loss(trained):
        around = replace(parts, trained=shards.around_layers(trained))
        model, mtp = around.models()
        tokens = FlatTokens.from_rows(ids_BQ, jnp.zeros_like(counts_B), counts_B)
        return pretraining_loss(
            model, tokens, mtp, gather_layer=shards.layer, **options
        )

    said, grads = jax.value_and_grad(loss, has_aux=True)(parts.trained)
    value, metrics = jax.tree.map(lambda x: total(x, SLOTS), said)
    return shards.summed(grads), value, metrics


class _Shards:
    """Parameters in shards, and how they become whole; on one device they are."""

    def __init__(self, stored: Any):
        self._stored = stored
        flat = jax.tree_util.tree_leaves_with_path(stored)
        self._by_path = {path_name(path): spec for path, spec in flat}

    def around_layers(self, trained: Any) -> Any:
        """Everything but the target's layers is whole from the start."""

        def each(path, leaf, spec):
            name = path_name(path)
            if name.startswith(_LAYERS):
                return leaf
            return gather(leaf, spec, rule_for(name).spec(leaf.shape))

        return jax.tree_util.tree_map_with_path(each, trained, self._stored)

    def layer(self, layer: DeepSeekV4Layer, stack: int) -> DeepSeekV4Layer:
        """One layer of a stack, whole but for other shards' experts."""

        def each(path, leaf):
            name = path_name(path)
            spec = self._by_path.get(f"{_LAYERS}{stack}.{name}")
            if spec is None:  # It is not trained, and whole.
                return leaf
            # Without the stack's own axis.
            spec = PartitionSpec(*spec[1:])
            return gather(leaf, spec, rule_for(name).spec(leaf.shape))

        return jax.tree_util.tree_map_with_path(each, layer)

    def summed(self, grads: Any) -> Any:
        """Gathering sums gradients on its way back; what was whole is summed here."""
        return jax.tree.map(
            lambda grad, spec: total(grad, unused_slots(spec)), grads, self._stored
        )
