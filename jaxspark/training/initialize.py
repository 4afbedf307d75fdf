"""Where a drafter starts: from its target, or from another drafter.

A draft layer that starts as one of the target's last layers already knows the residual
stream; `fc` starts by passing on the last tap. DSpark and DFlash drafters start further
on by `least_squares`.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspark.checkpoints.tree import named_parameters
from jaxspark.drafters import DSparkDrafter, Eagle3Drafter
from jaxspark.models import DenseDecoder, TargetDecoder

# Inputs without a known part start with a small one, for the sake of symmetry breaking.
_LITTLE = 0.02


def use_vocabulary(
    drafter: Any, target: TargetDecoder, ids_W: np.ndarray | None
) -> None:
    """Gives a drafter with a pruned vocabulary its ids and the target's head rows."""
    if drafter.draft_ids is not None:
        drafter.draft_ids[...] = jnp.asarray(ids_W, jnp.int32)
        drafter.lm_head.weight[...] = target.head_VD[ids_W].astype(drafter.dtype)


def from_target(drafter: DSparkDrafter | Eagle3Drafter, target: DenseDecoder) -> None:
    """Draft layers become copies of the target's last layers, in place.

    An Eagle3 layer reads embedding and feature side by side: its projections start as
    the target's on the feature, and nearly blind to the embedding.

    Raises:
      ValueError: the draft layers have other shapes than the target's.
    """
    layers: list[Any] = list(drafter.layers)
    depth = len(layers)
    sources = target.layers[max(len(target.layers) - depth, 0) :]
    for index, layer in enumerate(layers):
        source = sources[min(index, len(sources) - 1)]
        _copy(layer, source)
        # The target has no such norm: start with the size its vectors have.
        for name, projection in (("q_norm", "q_proj"), ("k_norm", "k_proj")):
            mine = getattr(layer.self_attn, name)
            theirs = getattr(source.self_attn, name)
            if mine is not None and theirs is None:
                weight_OI = getattr(source.self_attn, projection).weight[...]
                scaled_OI = weight_OI * source.input_layernorm.weight[...]
                size = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(scaled_OI), axis=1)))
                mine.weight[...] = jnp.full_like(mine.weight[...], size)
    drafter.norm.weight[...] = target.norm.weight[...].astype(drafter.dtype)
    # Features reach the projections through a norm of their own.
    norm = (
        layers[0].hidden_norm
        if isinstance(drafter, Eagle3Drafter)
        else drafter.hidden_norm
    )
    norm.weight[...] = sources[0].input_layernorm.weight[...].astype(drafter.dtype)
    D = target.config.hidden_size
    drafter.fc.weight[...] = _passing_last(drafter.fc.weight[...], jnp.eye(D))
    if isinstance(drafter, DSparkDrafter) and drafter.markov_head is not None:
        # No bias at first: the heads start as the backbone alone.
        weight = drafter.markov_head.markov_w2.weight
        weight[...] = jnp.zeros_like(weight[...])


def _passing_last(weight_OI, known_OJ):
    """A map whose last J inputs go through `known_OJ`, the others hardly count."""
    others = _LITTLE * weight_OI[:, : weight_OI.shape[1] - known_OJ.shape[1]]
    return jnp.concatenate([others, known_OJ.astype(weight_OI.dtype)], axis=1)


def _copy(layer: nnx.Module, source: nnx.Module) -> None:
    arrays = dict(named_parameters(source))
    for path, variable in nnx.to_flat_state(nnx.state(layer, nnx.Param)):
        name = ".".join(map(str, path))
        if name not in arrays:
            continue
        mine, theirs = variable[...], arrays[name].astype(variable.dtype)
        if mine.ndim == 2 and mine.shape[1] == 2 * theirs.shape[1]:
            theirs = _passing_last(mine, theirs)
        if mine.shape != theirs.shape:
            raise ValueError(
                f"a draft layer's {name} has shape {mine.shape}, the target's "
                f"{theirs.shape}; initialize at random"
            )
        variable[...] = theirs


def from_drafter(drafter: nnx.Module, other: nnx.Module) -> list[str]:
    """Copies all parameters of equal name and shape; returns the names of the rest."""
    arrays = dict(named_parameters(other))
    left = []
    for path, variable in nnx.to_flat_state(nnx.state(drafter, nnx.Param)):
        name = ".".join(map(str, path))
        if name in arrays and arrays[name].shape == variable.shape:
            variable[...] = arrays[name].astype(variable.dtype)
        else:
            left.append(name)
    return left
