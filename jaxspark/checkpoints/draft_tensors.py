"""Tensors of drafter folders, in and out, whatever their configuration is written in.

Names are our parameter paths in DeepSpec's folders and in speculators'. Embedding and
LM head are copies of the target's: they are compared with it, then dropped.

A pruned vocabulary adds `lm_head.weight` [Vd, D], `d2t` [Vd] (int64 *offsets*: target
id = draft id + d2t[draft id]) and `t2d` [V] (which target ids are drafted); ours keeps
the absolute `draft_ids`.
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspark.checkpoints.tree import (
    Tensors,
    check_depth,
    load_module,
    named_parameters,
)
from jaxspark.drafters import (
    DSparkConfig,
    DSparkDrafter,
    Eagle3Config,
    Eagle3Drafter,
)
from jaxspark.errors import CheckpointError
from jaxspark.models import TargetConfig, TargetDecoder

type DraftConfig = DSparkConfig | Eagle3Config
type DraftModel = DSparkDrafter | Eagle3Drafter

# The target's alone, which some folders of speculators carry for training.
_TRAINING_ONLY = {"verifier_lm_head.weight", "verifier_norm.weight"}
# A target quantized to 4 bits lies a tenth away from its original, two models' matrices
# more than their own size.
_ANOTHER = 0.25
_ROWS = 4096


def check_fits(config: DraftConfig, target: TargetConfig, *, where: str) -> None:
    """Raises `CheckpointError` if the drafter was made for another target."""
    try:
        config.check_target(target)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None


def check_taps(config: DraftConfig, *, where: str) -> None:
    """Raises `CheckpointError` for a tap that other programs see differently."""
    last = config.num_target_layers - 1
    if last in config.target_layer_ids:
        raise CheckpointError(
            f"{where}: target_layer_ids {config.target_layer_ids} has the target's "
            f"last layer {last}, expected earlier layers: other programs take that "
            "layer's features after the final norm, so the drafter would see others "
            "than it was trained on"
        )


def drafter_from_tensors(
    config: DraftConfig,
    target: TargetConfig,
    tensors: Tensors,
    *,
    dtype,
    model: TargetDecoder | None = None,
) -> DraftModel:
    """Builds the drafter from a folder's tensors.

    Args:
      config: the drafter's.
      target: the target's configuration.
      tensors: what the folder holds.
      dtype: of the drafter's parameters.
      model: the target itself, if at hand: copies of its matrices are compared with
        it, and a pruned head that the folder leaves out is taken from it.

    Raises:
      CheckpointError: missing, extra or wrong tensors, copies of another target's
        matrices, a vocabulary map that does not fit.
    """
    pruned = config.draft_vocab_size
    copies = {"embed_tokens.weight"} | ({"lm_head.weight"} if not pruned else set())
    for name in sorted(copies & set(tensors.shapes)):
        _check_copy(name, tensors, target, model)
    dropped = copies | _TRAINING_ONLY | ({"d2t", "t2d"} if pruned else set())
    own = tensors.renamed({n: n for n in tensors.shapes if n not in dropped})
    if pruned:
        ids = _draft_ids(pruned, config, tensors)
        own = _with(own, "draft_ids", ids)
        if "lm_head.weight" not in own.shapes:
            if model is None:
                raise CheckpointError(
                    f"{tensors.where}: has no lm_head.weight; load it with the "
                    "target's model, which has the rows"
                )
            own = _with(own, "lm_head.weight", np.asarray(model.head_VD[ids]))
    check_depth(own, config.backbone.num_hidden_layers)
    kind: Any = Eagle3Drafter if isinstance(config, Eagle3Config) else DSparkDrafter
    return load_module(lambda: kind(config, dtype=dtype, rngs=nnx.Rngs(0)), own)


def _check_copy(
    name: str, tensors: Tensors, target: TargetConfig, model: TargetDecoder | None
) -> None:
    """A copy must be the target's matrix but for rounding.

    Nearly the target's is what a quantized target looks like: a warning.
    """
    shape = (target.vocab_size, target.hidden_size)
    if tensors.shapes[name] != shape:
        raise CheckpointError(
            f"{tensors.where}: {name} expected {shape} as in the target, found "
            f"{tensors.shapes[name]}"
        )
    if model is None:
        return
    theirs_VD = model.head_VD if name == "lm_head.weight" else model.embed_tokens.weight
    stored_VD = tensors.read(name)
    if not jnp.issubdtype(stored_VD.dtype, jnp.floating):
        raise CheckpointError(
            f"{tensors.where}: {name} has type {stored_VD.dtype}, expected floats"
        )
    distance = relative_distance(stored_VD, theirs_VD[...])
    if not distance:
        return
    problem = (
        f"{tensors.where}: {name} is not the target's: the difference is "
        f"{distance:.2g} of its size (root mean square), expected a copy"
    )
    if not distance <= _ANOTHER:
        raise CheckpointError(
            f"{problem}; the drafter was made for another target, or has a matrix of "
            "its own, which is not supported"
        )
    warnings.warn(
        f"{problem}; drafting goes on with the target's (quantized?), which may accept "
        "a little less",
        stacklevel=2,
    )


def relative_distance(stored_VD: np.ndarray, own_VD: jax.Array) -> float:
    """|stored - own| / |own|; 0 if both can be one matrix rounded to their types."""
    types = [jnp.finfo(array.dtype) for array in (stored_VD, own_VD)]
    epsilon = max(float(kind.eps) for kind in types)
    least = epsilon * max(float(kind.smallest_normal) for kind in types)
    squares, difference, equal = 0.0, 0.0, True
    for begin in range(0, len(stored_VD), _ROWS):
        a_VD = stored_VD[begin : begin + _ROWS].astype(np.float32)
        b_VD = np.asarray(own_VD[begin : begin + _ROWS]).astype(np.float32)
        apart_VD = np.abs(a_VD - b_VD)
        bound_VD = epsilon * np.maximum(np.abs(a_VD), np.abs(b_VD)) + least
        equal = equal and bool((apart_VD <= bound_VD).all())
        difference += float(np.square(apart_VD, dtype=np.float64).sum())
        squares += float(np.square(b_VD, dtype=np.float64).sum())
    return 0.0 if equal else float(np.sqrt(difference / max(squares, least)))


def _draft_ids(size: int, config: DraftConfig, tensors: Tensors) -> np.ndarray:
    """Absolute target ids [Vd] from the stored offsets."""
    vocab = config.backbone.vocab_size
    for name, shape in (("d2t", (size,)), ("t2d", (vocab,))):
        if name == "t2d" and name not in tensors.shapes:
            continue  # d2t says the same.
        if tensors.shapes.get(name) != shape:
            raise CheckpointError(
                f"{tensors.where}: {name} expected {shape}, found "
                f"{tensors.shapes.get(name, 'none')}"
            )
    offsets = tensors.read("d2t")
    if not np.issubdtype(offsets.dtype, np.integer):
        raise CheckpointError(
            f"{tensors.where}: d2t has type {offsets.dtype}, expected integers"
        )
    ids = np.arange(size) + offsets.astype(np.int64)
    if ids.min() < 0 or ids.max() >= vocab or len(np.unique(ids)) != size:
        raise CheckpointError(
            f"{tensors.where}: d2t maps to ids {ids.min()}..{ids.max()}, "
            f"{len(np.unique(ids))} of them distinct; expected {size} distinct ids in "
            f"0..{vocab - 1}"
        )
    if "t2d" in tensors.shapes:
        drafted = np.flatnonzero(tensors.read("t2d"))
        if not np.array_equal(drafted, np.sort(ids)):
            raise CheckpointError(
                f"{tensors.where}: t2d marks {len(drafted)} ids that are not the "
                f"{size} ids of d2t"
            )
    return ids


def _with(tensors: Tensors, added: str, array: np.ndarray) -> Tensors:
    return Tensors(
        where=tensors.where,
        shapes={**tensors.shapes, added: array.shape},
        read=lambda name: array if name == added else tensors.read(name),
    )


def tensors_from_drafter(
    drafter: DraftModel,
    target: TargetDecoder | None = None,
    *,
    pruned_head: bool = True,
) -> dict[str, jax.Array | np.ndarray]:
    """A folder's tensors; with `target`, copies of its embedding and LM head too."""
    arrays: dict[str, jax.Array | np.ndarray] = dict(named_parameters(drafter))
    if not pruned_head:
        arrays.pop("lm_head.weight", None)
    ids = arrays.pop("draft_ids", None)
    if ids is not None:
        host = np.asarray(ids).astype(np.int64)
        drafted = np.zeros(drafter.config.backbone.vocab_size, np.bool_)
        drafted[host] = True
        arrays |= {"d2t": host - np.arange(len(host)), "t2d": drafted}
    if target is not None:
        dtype = jnp.dtype(drafter.dtype)
        arrays["embed_tokens.weight"] = target.embed_tokens.weight[...].astype(dtype)
        if ids is None:
            arrays["lm_head.weight"] = target.head_VD.astype(dtype)
    return arrays
