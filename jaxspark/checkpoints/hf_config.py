"""Hugging Face `config.json` <-> `DenseConfig`, for Llama and Qwen3.

Defaults are those of transformers' `LlamaConfig` and `Qwen3Config`. What these classes
read and the decoder does not compute, such as sliding windows, is an error, never
ignored; keys that only other classes read (`logits_scaling`, ...) change nothing there
and nothing here.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxspark.checkpoints.fields import Fields
from jaxspark.checkpoints.rope_settings import rope_from_hf, rope_scaling_to_hf
from jaxspark.errors import CheckpointError
from jaxspark.models import DenseConfig

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}
# Qwen3Config sets 128 where Llama divides the width.
_DEFAULT_HEAD_DIM = {"llama": None, "qwen3": 128}


def dense_config_from_hf(
    config: Mapping[str, Any],
    *,
    where: str = "config.json",
    family: str | None = None,
) -> DenseConfig:
    """The decoder's architecture from a parsed `config.json`.

    Args:
      config: the JSON object.
      where: names the file in errors.
      family: "llama" or "qwen3"; by default from `architectures` or `model_type`.

    Raises:
      CheckpointError: an unsupported architecture or feature, a missing key or a value
        of the wrong type; names key, value and what was expected.
    """
    fields = Fields(config, where)
    family = family or _family(fields)
    _reject_unsupported(fields)
    heads = fields.integer("num_attention_heads")
    width = fields.integer("hidden_size")
    try:
        return DenseConfig(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=width,
            intermediate_size=fields.integer("intermediate_size"),
            num_hidden_layers=fields.integer("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=fields.integer("num_key_value_heads", heads),
            head_dim=_head_dim(fields, family),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope=rope_from_hf(fields),
            max_position_embeddings=fields.integer("max_position_embeddings"),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            qk_norm=family == "qwen3",
            attention_bias=fields.boolean("attention_bias", False),
            mlp_bias=family == "llama" and fields.boolean("mlp_bias", False),
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _head_dim(fields: Fields, family: str) -> int:
    if "head_dim" in fields or _DEFAULT_HEAD_DIM[family]:
        return fields.integer("head_dim", _DEFAULT_HEAD_DIM[family])
    width = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    if width % heads:
        raise fields.wrong("hidden_size", f"a multiple of num_attention_heads {heads}")
    return width // heads


def _family(fields: Fields) -> str:
    """The class that transformers would load: `model_type` chooses it there."""
    kinds = list(ARCHITECTURES.values())
    kind = fields.text("model_type", None)
    if kind not in (None, *kinds):
        raise fields.wrong("model_type", f"one of {kinds}")
    architectures = fields.values.get("architectures")
    if not architectures:
        if kind is None:
            raise fields.wrong("model_type", f"one of {kinds}")
        return kind
    for name, family in ARCHITECTURES.items():
        if architectures == [name] and kind in (None, family):
            return family
    expected = [n for n, family in ARCHITECTURES.items() if kind in (None, family)]
    raise fields.wrong("architectures", f"one of {expected}")


def _reject_unsupported(fields: Fields) -> None:
    """Raises for what the decoder would silently compute differently."""
    if fields.text("hidden_act", "silu") not in ("silu", "swish"):
        raise fields.wrong("hidden_act", "'silu' (also called 'swish')")
    if not fields.boolean("is_causal", True):
        raise fields.wrong("is_causal", "true (a decoder)")
    if fields.boolean("use_sliding_window", False):
        raise fields.wrong("use_sliding_window", "false (full attention)")
    layer_types = fields.values.get("layer_types")
    if layer_types and not (
        isinstance(layer_types, list)
        and len(layer_types) == fields.integer("num_hidden_layers")
        and all(kind == "full_attention" for kind in layer_types)
    ):
        raise fields.wrong("layer_types", "one 'full_attention' per layer")
    if fields.values.get("quantization_config"):
        raise fields.wrong("quantization_config", "none (unquantized weights)")


def dense_config_to_hf(
    config: DenseConfig, *, dtype, stop_ids: tuple[int, ...] = ()
) -> dict[str, Any]:
    """The `config.json` of a decoder, in the v4 spelling that v5 reads too.

    Raises:
      CheckpointError: a combination that neither Llama nor Qwen3 has in their format.
    """
    if config.qk_norm and config.mlp_bias:
        raise CheckpointError(
            "qk_norm with mlp_bias has no Hugging Face form: Qwen3 has no mlp_bias"
        )
    family = "qwen3" if config.qk_norm else "llama"
    architecture = {kind: name for name, kind in ARCHITECTURES.items()}[family]
    result: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": family,
        "torch_dtype": jnp.dtype(dtype).name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "rope_theta": config.rope.rope_theta,
        "rope_scaling": rope_scaling_to_hf(config.rope),
    }
    if family == "llama":
        result["mlp_bias"] = config.mlp_bias
    # Said even where there is none: LlamaConfig's own default is token 2.
    if stop_ids or family == "llama":
        result["eos_token_id"] = list(stop_ids) or None
    return result


def stop_ids_from_hf(
    *configs: Mapping[str, Any], where: str = "config.json"
) -> tuple[int, ...]:
    """End-of-sequence ids of the first configuration that names any.

    Give `generation_config.json` before `config.json`, as transformers does.

    Raises:
      CheckpointError: `eos_token_id` is neither an integer nor a list of them.
    """
    for config in configs:
        fields = Fields(config, where)
        if "eos_token_id" not in fields:
            continue
        if isinstance(config["eos_token_id"], list):
            return fields.integers("eos_token_id")
        return (fields.integer("eos_token_id", least=0),)
    return ()
