"""Loading and saving targets and drafters, whatever they are stored as."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspark.checkpoints import folders, hub
from jaxspark.checkpoints.built_in import BUILT_IN
from jaxspark.checkpoints.deepseek_v4 import load_deepseek_v4
from jaxspark.checkpoints.deepseek_v4_config import (
    is_v4,
    v4_config_from_hf,
    v4_config_to_hf,
)
from jaxspark.checkpoints.deepseek_v4_folder import (
    SHARD_BYTES,
    v4_drafter_from_folder,
    v4_tensors,
)
from jaxspark.checkpoints.deepseek_v4_released import dequantized
from jaxspark.checkpoints.draft_folders import read_drafter
from jaxspark.checkpoints.draft_tensors import DraftModel
from jaxspark.checkpoints.fields import read_json, write_json
from jaxspark.checkpoints.gguf_file import (
    dense_config_from_gguf,
    gguf_name,
    gguf_stop_ids,
    gguf_tensors,
)
from jaxspark.checkpoints.gguf_header import open_gguf
from jaxspark.checkpoints.gguf_tokenizer import tokenizer_from_gguf
from jaxspark.checkpoints.hf_config import (
    dense_config_from_hf,
    dense_config_to_hf,
    stop_ids_from_hf,
)
from jaxspark.checkpoints.safetensors_files import open_safetensors, write_safetensors
from jaxspark.checkpoints.tokenizer import load_tokenizer, save_tokenizer
from jaxspark.checkpoints.tree import (
    Tensors,
    check_depth,
    load_module,
    named_parameters,
)
from jaxspark.drafters import (
    Drafter,
    NgramDrafter,
    PlainDrafter,
    hybrid,
)
from jaxspark.errors import CheckpointError
from jaxspark.models import (
    DeepSeekV4,
    DeepSeekV4Config,
    DenseConfig,
    DenseDecoder,
    TargetConfig,
    TargetDecoder,
    TargetModel,
)
from jaxspark.settings import standard_settings
from jaxspark.target import Target
from jaxspark.text import Tokenizer

_HYBRID = "hybrid:"
NAMED_DRAFTERS = {"ngram": NgramDrafter, "none": PlainDrafter}
# Trained drafters that come with the package, in the DeepSpec format.
SHIPPED_DRAFTERS = {
    "dspark": Path(__file__).parents[1] / "weights" / "dspark_smollm2_135m_block7"
}


@standard_settings()
def load_target(
    source: str | Path,
    *,
    dtype: Any = jnp.float32,
    keep_quantized: bool = False,
    verify: bool = False,
) -> Target:
    """Loads a Llama, Qwen3 or DeepSeek-V4 model.

    Args:
      source: a folder of safetensors, a `.gguf` file, the name of a built-in model
        ("smollm2-135m-instruct"), or a Hub id ("organization/name").
      dtype: type of parameters, activations and caches: float32 or bfloat16.
      keep_quantized: whether the FP8 and FP4 matrices of a released DeepSeek-V4 folder
        stay so in memory and are dequantized to `dtype` in each product.
      verify: compares every file with its checksum, also those that have not changed
        since they were compared. JAXSPARK_VERIFY=1 in the environment asks for it too.

    Raises:
      CheckpointError: nothing there, damaged, unsupported; says what was expected.
    """
    check_dtype(dtype)
    path = Path(source)
    if keep_quantized and (str(source) in BUILT_IN or path.is_file()):
        raise _cannot_stay_quantized(source)
    if str(source) in BUILT_IN:
        packaged = BUILT_IN[str(source)]
        path = packaged.find()
        packaged.check(path, again=verify)
        return _target_from_gguf(path, dtype, str(source))
    if path.is_file():
        return _target_from_gguf(path, dtype)
    folder = resolve_folder(source, verify=verify)
    return _target_from_folder(folder, dtype, str(source), keep_quantized)


def _cannot_stay_quantized(source: str | Path) -> CheckpointError:
    return CheckpointError(
        f"{source}: only the matrices of DeepSeek-V4 folders may stay quantized"
    )


def check_dtype(dtype: Any) -> None:
    """Raises `CheckpointError` unless `dtype` is float32 or bfloat16."""
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        raise CheckpointError(f"dtype is {dtype}, expected float32 or bfloat16")


def resolve_folder(source: str | Path, *, verify: bool = False) -> Path:
    """A local folder, or the downloaded folder of a Hub id, verified by checksums.

    `verify` has them computed anew, as for `load_target`.
    """
    path = Path(source)
    if not path.is_dir():
        if not hub.is_hub_id(str(source)):
            raise CheckpointError(
                f"{source}: no such folder or file, and not a Hub id "
                f"(organization/name); built-in models: {', '.join(BUILT_IN)}"
            )
        path = hub.download(str(source))
    folders.verify(path, again=verify)
    return path


def _target_from_gguf(path: Path, dtype: Any, name: str | None = None) -> Target:
    file = open_gguf(path)
    config = dense_config_from_gguf(file)
    tokenizer = tokenizer_from_gguf(file)
    _check_tokenizer(tokenizer, config, str(path))
    return Target(
        model=_decoder(config, gguf_tensors(file, config), dtype),
        tokenizer=tokenizer,
        stop_ids=gguf_stop_ids(file),
        name=name or gguf_name(file),
    )


def _target_from_folder(
    folder: Path, dtype: Any, name: str, keep_quantized: bool
) -> Target:
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder}: holds adapter_config.json; expected a whole model, so merge "
            "the adapter into its weights and save that"
        )
    config_path = folder / "config.json"
    raw = read_json(config_path)
    config: TargetConfig
    if is_v4(raw):
        config = v4_config_from_hf(raw, where=str(config_path))
    else:
        config = dense_config_from_hf(raw, where=str(config_path))
    generation = folder / "generation_config.json"
    settings = read_json(generation) if generation.exists() else {}
    tokenizer = load_tokenizer(folder)
    if tokenizer is not None:
        _check_tokenizer(tokenizer, config, str(folder))
    stop_ids = stop_ids_from_hf(settings, raw, where=str(folder))
    for stop in stop_ids:
        if not 0 <= stop < config.vocab_size:
            raise CheckpointError(
                f"{folder}: eos_token_id is {stop}, expected an id of the vocabulary "
                f"0..{config.vocab_size - 1}"
            )
    if tokenizer is not None:
        # As servers do, the tokenizer's end of text stops too. Whoever cuts texts where
        # generation would have stopped asks the tokenizer: both hold the same ids.
        stop_ids = tuple(dict.fromkeys(stop_ids + tokenizer.stop_ids))
        tokenizer = tokenizer.with_stop_ids(stop_ids)
    tensors = open_safetensors(folder)
    model: TargetDecoder
    if isinstance(config, DeepSeekV4Config):
        model = load_deepseek_v4(
            config, dequantized(tensors), dtype=dtype, keep_quantized=keep_quantized
        )
    elif keep_quantized:
        raise _cannot_stay_quantized(folder)
    else:
        model = _decoder(config, _without_prefix(tensors), dtype)
    return Target(
        model=model,
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        name=name,
        generation_config=settings,
    )


def _check_tokenizer(
    tokenizer: Tokenizer, config: DenseConfig | DeepSeekV4Config, where: str
) -> None:
    # Models often pad their vocabulary, so fewer tokens than rows are fine. Beyond the
    # rows, tokens that were added for padding are common; prompts cannot hold them.
    if tokenizer.base_size > config.vocab_size:
        raise CheckpointError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} ids, the model's "
            f"vocab_size is {config.vocab_size}"
        )
    for stop in tokenizer.stop_ids:
        if stop >= config.vocab_size:
            text = tokenizer.core.id_to_token(stop)
            raise CheckpointError(
                f"{where}: the tokenizer ends texts with {text!r}, id {stop}; the "
                f"model's vocab_size is {config.vocab_size}"
            )


def _without_prefix(tensors: Tensors) -> Tensors:
    """Drops "model." from names, and the rope buffers that old exports carry."""
    kept: dict[str, str] = {}
    for name in tensors.shapes:
        short = name.removeprefix("model.")
        if short in kept:
            raise CheckpointError(f"{tensors.where}: has both {kept[short]} and {name}")
        if not name.endswith("rotary_emb.inv_freq"):
            kept[short] = name
    return tensors.renamed(kept)


def _decoder(config: DenseConfig, tensors: Tensors, dtype: Any) -> DenseDecoder:
    if config.tie_word_embeddings:
        config, tensors = _tied(config, tensors)
    check_depth(tensors, config.num_hidden_layers)
    return load_module(
        lambda: DenseDecoder(config, dtype=dtype, rngs=nnx.Rngs(0)), tensors
    )


def _tied(config: DenseConfig, tensors: Tensors) -> tuple[DenseConfig, Tensors]:
    """A model whose configuration ties head and embedding, as its tensors are.

    One of the two is enough, and a copy is dropped; two that differ are not tied
    (transformers 5 does the same: full fine-tunes leave such checkpoints).
    """
    embedding, head = "embed_tokens.weight", "lm_head.weight"
    names = {name: name for name in tensors.shapes if name != head}
    if head not in tensors.shapes:
        return config, tensors
    if embedding not in tensors.shapes:
        return config, tensors.renamed({embedding: head, **names})
    if np.array_equal(tensors.read(embedding), tensors.read(head)):
        return config, tensors.renamed(names)
    return replace(config, tie_word_embeddings=False), tensors


def save_target(
    folder: str | Path,
    target: Target,
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a Hugging Face folder with checksums, whole or not at all.

    Args:
      folder: where; must be new or empty unless `overwrite`.
      target: what to write; a GGUF target is written dequantized, DeepSeek-V4 under
        its released names and not quantized (see `save_deepseek_v4`).
      overwrite: whether to replace a checkpoint that is there.
      shard_bytes: weights are split into files of at most this size.

    Raises:
      CheckpointError: the folder is taken; the previous content stays.
    """
    model = target.model
    settings = {"dtype": model.dtype, "stop_ids": target.stop_ids}
    arrays: Iterable
    if isinstance(model, DeepSeekV4):
        config = v4_config_to_hf(model.config, **settings)
        arrays = v4_tensors(model)
    elif isinstance(model, DenseDecoder):
        config = dense_config_to_hf(model.config, **settings)
        arrays = (
            (name if name.startswith("lm_head.") else f"model.{name}", array)
            for name, array in named_parameters(model).items()
        )
    else:
        raise CheckpointError(
            f"there is no checkpoint format for a {type(model).__name__}"
        )
    with folders.new_folder(Path(folder), overwrite=overwrite) as new:
        write_json(new / "config.json", config)
        generation = dict(target.generation_config)
        if target.stop_ids:
            generation["eos_token_id"] = list(target.stop_ids)
        if generation:
            write_json(new / "generation_config.json", generation)
        if target.tokenizer is not None:
            save_tokenizer(new, target.tokenizer)
        write_safetensors(new, arrays, shard_bytes=shard_bytes)


@standard_settings()
def load_drafter(
    source: str | Path, target: Target | TargetModel, *, dtype: Any = None
) -> Drafter:
    """A drafter for `target`.

    Args:
      source: "ngram" (prompt lookup), "none" (plain decoding), "dspark" (the trained
        drafter for SmolLM2-135M-Instruct that comes with jaxspark), a folder of
        DeepSpec or speculators, the Hub id of one, or "hybrid:" and one of these three
        (prompt lookup beside).
        For DeepSeek-V4 also the folder or Hub id of a checkpoint with draft stages,
        which stay quantized in memory if the target's matrices do.
      target: what it shall draft for.
      dtype: of a checkpoint's parameters; None takes the target's.

    Raises:
      CheckpointError: nothing there, damaged, or made for another target.
    """
    if str(source) in NAMED_DRAFTERS:
        return NAMED_DRAFTERS[str(source)]()
    if str(source).startswith(_HYBRID):
        second = load_drafter(str(source)[len(_HYBRID) :], target, dtype=dtype)
        return hybrid(NgramDrafter(block_length=second.block_length), second)
    model = Target.of(target).model
    dtype = model.dtype if dtype is None else dtype
    if isinstance(model, DeepSeekV4):
        folder = resolve_folder(source)
        if is_v4(read_json(folder / "config.json")):
            return v4_drafter_from_folder(folder, model, dtype=dtype)
    if isinstance(model, TargetDecoder):
        return load_draft_checkpoint(source, model, dtype=dtype)
    raise CheckpointError(
        f"{source}: there are no draft checkpoints for a {type(model).__name__}"
    )


def drafter_folder(source: str | Path) -> tuple[Path, bool]:
    """Where a trained drafter lies, and whether prompt lookup is beside it.

    Args:
      source: as for `load_drafter`.

    Raises:
      CheckpointError: nothing there, or not a trained drafter.
    """
    name = str(source).removeprefix(_HYBRID)
    if name in NAMED_DRAFTERS:
        raise CheckpointError(f"{source}: is no trained drafter, it has no folder")
    folder = resolve_folder(SHIPPED_DRAFTERS.get(name, name))
    return folder, name != str(source)


@standard_settings()
def load_draft_checkpoint(
    source: str | Path,
    target: TargetConfig | TargetDecoder,
    *,
    dtype: Any = jnp.float32,
) -> DraftModel:
    """Loads a DSpark, DFlash or Eagle3 drafter in DeepSpec's or speculators' format.

    Args:
      source: a local folder, a Hub id, or "dspark" for the one that is shipped.
      target: the model it shall draft for, with which the folder's embedding and LM
        head are compared; or its configuration where the folder needs no more.
      dtype: float32 or bfloat16; normally the target's.

    Raises:
      CheckpointError: damaged, unsupported, or made for another target.
    """
    check_dtype(dtype)
    folder = resolve_folder(SHIPPED_DRAFTERS.get(str(source), source))
    return read_drafter(folder, target, dtype=dtype)
