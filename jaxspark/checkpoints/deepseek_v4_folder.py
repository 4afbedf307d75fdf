"""DeepSeek-V4 folders: the drafter that its files carry, and how they are written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from jaxspark.checkpoints import folders
from jaxspark.checkpoints.deepseek_v4 import (
    draft_plan,
    fill,
    target_plan,
    tensors_of,
)
from jaxspark.checkpoints.deepseek_v4_config import v4_config_from_hf, v4_config_to_hf
from jaxspark.checkpoints.deepseek_v4_released import dequantized, stored
from jaxspark.checkpoints.fields import Fields, read_json, write_json
from jaxspark.checkpoints.safetensors_files import open_safetensors, write_safetensors
from jaxspark.checkpoints.tree import named_parameters
from jaxspark.drafters import DeepSeekV4DSpark, DeepSeekV4DSparkConfig, MTPDrafter
from jaxspark.errors import CheckpointError
from jaxspark.models import DeepSeekV4
from pallas_kernels.quantized import Quantized

SHARD_BYTES = 5 * 10**9
_DSPARK = (
    "dspark_block_size",
    "dspark_target_layer_ids",
    "dspark_noise_token_id",
    "dspark_markov_rank",
)
_QUANTIZED = {
    "expert_dtype": "fp4",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}


def v4_drafter_from_folder(
    folder: Path, target: DeepSeekV4, *, dtype: Any
) -> DeepSeekV4DSpark | MTPDrafter:
    """The draft stages of a released folder: DSpark's if its configuration names them.

    They stay quantized in memory if the target's matrices do.

    Raises:
      CheckpointError: there are none, they are damaged, or another target's.
    """
    path = folder / "config.json"
    raw = read_json(path)
    if v4_config_from_hf(raw, where=str(path)) != target.config:
        raise CheckpointError(f"{path}: describes another model than the target")
    tensors = dequantized(open_safetensors(folder))
    names = {name: name for name in tensors.shapes if name.startswith("mtp.")}
    if not names:
        raise CheckpointError(f"{folder}: has no draft stages, tensors named mtp.")
    if "dspark_block_size" in raw:
        config = _dspark_config(Fields(raw, str(path)), target.config, names)

        def build():
            return DeepSeekV4DSpark(config, dtype=dtype, rngs=nnx.Rngs(0))
    else:

        def build():
            return MTPDrafter(target.config, dtype=dtype, rngs=nnx.Rngs(0))

    kept = any(isinstance(w, Quantized) for w in named_parameters(target).values())
    return fill(build, draft_plan, tensors.renamed(names), keep_quantized=kept)


def _dspark_config(fields: Fields, target, names) -> DeepSeekV4DSparkConfig:
    # num_nextn_predict_layers says 1 where there are three: the files know best.
    stages = len({name.split(".")[1] for name in names})
    try:
        return DeepSeekV4DSparkConfig(
            target=target,
            dspark_block_size=fields.integer("dspark_block_size"),
            dspark_target_layer_ids=fields.integers("dspark_target_layer_ids"),
            dspark_noise_token_id=fields.integer("dspark_noise_token_id", least=0),
            dspark_markov_rank=fields.integer("dspark_markov_rank"),
            n_mtp_layers=stages,
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{fields.where}: {error}") from error


def save_deepseek_v4(
    folder: str | Path,
    model: DeepSeekV4,
    drafter: DeepSeekV4DSpark | MTPDrafter | None = None,
    *,
    quantized: bool = True,
    transformers_names: bool = False,
    stop_ids: tuple[int, ...] = (),
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a folder with checksums, whole or not at all.

    Args:
      folder: where; must be new or empty unless `overwrite`.
      model: the target.
      drafter: draft stages to put beside it; released names only.
      quantized: in the released types (FP8, FP4), else as the model holds them.
      transformers_names: under transformers' names, experts stacked; not quantized.
      stop_ids: ids that end a text.
      overwrite: whether to replace a checkpoint that is there.
      shard_bytes: weights are split into files of at most this size.

    Raises:
      CheckpointError: the folder is taken; the previous content stays.
      ValueError: options that exclude each other, or a drafter for another target.
    """
    if transformers_names and (quantized or drafter is not None):
        raise ValueError("transformers' names have no quantized form and no drafter")
    config = v4_config_to_hf(model.config, dtype=model.dtype, stop_ids=stop_ids)
    if drafter is not None:
        drafter.check_target(model.config)
    if isinstance(drafter, DeepSeekV4DSpark):
        config |= {key: getattr(drafter.config, key) for key in _DSPARK}
    arrays = v4_tensors(model, drafter, released=not transformers_names)
    if quantized:
        config |= _QUANTIZED
        arrays = stored(arrays)
    with folders.new_folder(Path(folder), overwrite=overwrite) as new:
        write_json(new / "config.json", config)
        write_safetensors(new, arrays, shard_bytes=shard_bytes)


def v4_tensors(
    model: DeepSeekV4,
    drafter: DeepSeekV4DSpark | MTPDrafter | None = None,
    *,
    released: bool = True,
) -> Iterator[tuple[str, np.ndarray]]:
    """Named tensors of a target and of its drafter, one after the other."""
    config = model.config
    yield from tensors_of(
        model, lambda shapes: target_plan(config, shapes, released=released)
    )
    if drafter is not None:
        yield from tensors_of(drafter, draft_plan)
