"""DSpark, DFlash and Eagle3 drafters as DeepSpec folders, in and out.

`config.json` is the Qwen3 configuration of the draft layers plus the drafter's own
keys; tensors carry our parameter paths. Embedding and LM head in such a folder are
frozen copies of the target's, checked and dropped. DFlash is DSpark's architecture
without Markov rank and confidence head.

A pruned vocabulary (the speculators format's tensors) adds `lm_head.weight` [Vd, D],
`d2t` [Vd] (int64 *offsets*: target id = draft id + d2t[draft id]) and `t2d` [V] (which
target ids are drafted); ours keeps the absolute `draft_ids`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspark.checkpoints.errors import CheckpointError
from jaxspark.checkpoints.fields import Fields
from jaxspark.checkpoints.hf_config import dense_config_from_hf, dense_config_to_hf
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
from jaxspark.models import DenseConfig, DenseDecoder

DSPARK, EAGLE3 = "Qwen3DSparkModel", "Qwen3Eagle3Model"

type DraftConfig = DSparkConfig | Eagle3Config
type DraftModel = DSparkDrafter | Eagle3Drafter


def draft_config_from_deepspec(
    config: Mapping[str, Any], *, where: str = "config.json"
) -> DraftConfig:
    """A drafter's configuration from its parsed `config.json`.

    Raises:
      CheckpointError: another architecture, a missing key or a bad value.
    """
    fields = Fields(config, where)
    architectures = fields.values.get("architectures")
    if architectures not in ([DSPARK], [EAGLE3]):
        raise fields.wrong("architectures", f"[{DSPARK!r}] or [{EAGLE3!r}] (DeepSpec)")
    shared: dict[str, Any] = {
        "backbone": dense_config_from_hf(config, where=where, family="qwen3"),
        "target_layer_ids": fields.integers("target_layer_ids"),
        "num_target_layers": fields.integer("num_target_layers"),
        "draft_vocab_size": fields.integer("draft_vocab_size", None),
    }
    read = _read_dspark if architectures == [DSPARK] else _read_eagle3
    try:
        return read(fields, shared)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _read_dspark(fields: Fields, shared: dict[str, Any]) -> DSparkConfig:
    confidence = fields.boolean("enable_confidence_head", False)
    return DSparkConfig(
        **shared,
        block_size=fields.integer("block_size"),
        mask_token_id=fields.integer("mask_token_id", least=0),
        markov_rank=fields.integer("markov_rank", 0, least=0),
        markov_head_type=fields.text("markov_head_type", "vanilla"),
        enable_confidence_head=confidence,
        # Folders without a head may still carry the flag's default.
        confidence_head_with_markov=confidence
        and fields.boolean("confidence_head_with_markov", False),
        sample_from_anchor=fields.boolean("sample_from_anchor", True),
    )


def _read_eagle3(fields: Fields, shared: dict[str, Any]) -> Eagle3Config:
    return Eagle3Config(
        **shared,
        ttt_length=fields.integer("ttt_length"),
        step_loss_decay=fields.number("step_loss_decay", 0.8),
    )


def draft_config_to_deepspec(config: DraftConfig, *, dtype) -> dict[str, Any]:
    """The `config.json` of a drafter folder."""
    depth = config.backbone.num_hidden_layers
    result = dense_config_to_hf(config.backbone, dtype=dtype) | {
        "model_type": "qwen3",
        "tie_word_embeddings": False,
        "layer_types": ["full_attention"] * depth,
        "num_target_layers": config.num_target_layers,
        "target_layer_ids": list(config.target_layer_ids),
    }
    if config.draft_vocab_size is not None:
        result["draft_vocab_size"] = config.draft_vocab_size
    if isinstance(config, Eagle3Config):
        return result | {
            "architectures": [EAGLE3],
            "ttt_length": config.ttt_length,
            "step_loss_decay": config.step_loss_decay,
            "draft_num_hidden_layers": depth,
        }
    return result | {
        "architectures": [DSPARK],
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "markov_rank": config.markov_rank,
        "markov_head_type": config.markov_head_type,
        "enable_confidence_head": config.enable_confidence_head,
        "confidence_head_with_markov": config.confidence_head_with_markov,
        "sample_from_anchor": config.sample_from_anchor,
    }


def check_fits(config: DraftConfig, target: DenseConfig, *, where: str) -> None:
    """Raises `CheckpointError` if the drafter was made for another target."""
    try:
        config.check_target(target)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None


def check_format(config: DraftConfig, *, where: str) -> None:
    """Raises `CheckpointError` for what DeepSpec's format cannot say."""
    last = config.num_target_layers - 1
    if last in config.target_layer_ids:
        raise CheckpointError(
            f"{where}: target_layer_ids {config.target_layer_ids} has the target's "
            f"last layer {last}, expected earlier layers: DeepSpec takes that layer's "
            "features after the final norm, so the drafter would see others than it "
            "was trained on"
        )
    if not config.backbone.qk_norm or config.backbone.mlp_bias:
        raise CheckpointError(
            f"{where}: DeepSpec's draft layers are Qwen3's: expected qk_norm True and "
            f"mlp_bias False, found {config.backbone.qk_norm} and "
            f"{config.backbone.mlp_bias}"
        )


def drafter_from_tensors(
    config: DraftConfig,
    target: DenseConfig,
    tensors: Tensors,
    *,
    dtype,
    head_VD: jax.Array | None = None,
) -> DraftModel:
    """Builds the drafter from a folder's tensors.

    A pruned head that the folder leaves out is taken from `head_VD`, the target's.

    Raises:
      CheckpointError: missing, extra or wrong tensors, copies of the target's matrices
        of another shape, a vocabulary map that does not fit.
    """
    pruned = config.draft_vocab_size
    copies = {"embed_tokens.weight"} | ({"lm_head.weight"} if not pruned else set())
    copied = (target.vocab_size, target.hidden_size)
    for name in copies & set(tensors.shapes):
        if tensors.shapes[name] != copied:
            raise CheckpointError(
                f"{tensors.where}: {name} expected {copied} as in the target, found "
                f"{tensors.shapes[name]}"
            )
    dropped = copies | ({"d2t", "t2d"} if pruned else set())
    own = tensors.renamed({n: n for n in tensors.shapes if n not in dropped})
    if pruned:
        ids = _draft_ids(pruned, config, tensors)
        own = _with(own, "draft_ids", ids)
        if "lm_head.weight" not in own.shapes:
            if head_VD is None:
                raise CheckpointError(
                    f"{tensors.where}: has no lm_head.weight; load it with the "
                    "target's model, which has the rows"
                )
            own = _with(own, "lm_head.weight", np.asarray(head_VD[ids]))
    check_depth(own, config.backbone.num_hidden_layers)
    kind: Any = Eagle3Drafter if isinstance(config, Eagle3Config) else DSparkDrafter
    return load_module(lambda: kind(config, dtype=dtype, rngs=nnx.Rngs(0)), own)


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
    drafter: DraftModel, target: DenseDecoder | None = None, *, pruned_head: bool = True
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
