"""Hugging Face `config.json` <-> `DenseConfig`, for Llama and Qwen3.

Both spellings of rope are read: transformers v4 (`rope_theta` and `rope_scaling`,
whose type is `rope_type` or, older, `type`) and v5 (`rope_parameters`). Defaults are
those of transformers' `LlamaConfig` and `Qwen3Config`. What the decoder does not
compute, such as sliding windows or a partial rotation, is an error, never ignored.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxspark.checkpoints.errors import CheckpointError
from jaxspark.checkpoints.fields import Fields
from jaxspark.models import DenseConfig, RopeConfig
from jaxspark.models.layers.rope import ROPE_TYPES

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
            rope=_rope_from_hf(fields),
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
    architectures = fields.values.get("architectures")
    if architectures:
        for name, family in ARCHITECTURES.items():
            if architectures == [name]:
                return family
        raise fields.wrong("architectures", f"one of {list(ARCHITECTURES)}")
    model_type = fields.text("model_type")
    if model_type not in ARCHITECTURES.values():
        raise fields.wrong("model_type", f"one of {list(ARCHITECTURES.values())}")
    return model_type


def _reject_unsupported(fields: Fields) -> None:
    """Raises for what the decoder would silently compute differently."""
    if fields.text("hidden_act", "silu") != "silu":
        raise fields.wrong("hidden_act", "'silu'")
    if fields.boolean("use_sliding_window", False):
        raise fields.wrong("use_sliding_window", "false (full attention)")
    layer_types = fields.values.get("layer_types")
    if layer_types and not (
        isinstance(layer_types, list)
        and len(layer_types) == fields.integer("num_hidden_layers")
        and all(kind == "full_attention" for kind in layer_types)
    ):
        raise fields.wrong("layer_types", "one 'full_attention' per layer")
    _reject_partial(fields)
    if fields.values.get("quantization_config"):
        raise fields.wrong("quantization_config", "none (unquantized weights)")


def _reject_partial(fields: Fields) -> None:
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise fields.wrong("partial_rotary_factor", "1 (whole heads turn)")


def _rope_from_hf(fields: Fields) -> RopeConfig:
    rope = fields.table("rope_parameters") or fields.table("rope_scaling")
    theta = fields.number("rope_theta", 10000.0)
    if rope is None:
        return RopeConfig(rope_theta=theta)
    theta = rope.number("rope_theta", theta)
    key = "rope_type" if "rope_type" in rope else "type"
    kind = rope.text(key, "default")
    if kind not in ROPE_TYPES:
        raise rope.wrong(key, f"one of {list(ROPE_TYPES)}")
    _reject_partial(rope)
    if any(isinstance(value, dict) for value in rope.values.values()):
        raise CheckpointError(
            f"{rope.where} is {dict(rope.values)}, expected one set of parameters for "
            "all layers"
        )
    if kind == "default":
        return RopeConfig(rope_theta=theta)
    if kind == "linear":
        return RopeConfig(
            rope_theta=theta, rope_type=kind, factor=rope.number("factor")
        )
    positions = fields.integer("max_position_embeddings")
    original = rope.integer(
        "original_max_position_embeddings",
        fields.integer("original_max_position_embeddings", positions),
    )
    if kind == "llama3":
        return RopeConfig(
            rope_theta=theta,
            rope_type=kind,
            factor=rope.number("factor"),
            original_max_position_embeddings=original,
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
        )
    return RopeConfig(
        rope_theta=theta,
        rope_type=kind,
        # transformers derives an absent yarn factor from the two context lengths.
        factor=rope.number("factor", positions / original),
        original_max_position_embeddings=original,
        attention_factor=rope.number("attention_factor", None),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        mscale=rope.number("mscale", None),
        mscale_all_dim=rope.number("mscale_all_dim", None),
        truncate=rope.boolean("truncate", True),
    )


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
        "rope_scaling": _rope_scaling_to_hf(config.rope),
    }
    if family == "llama":
        result["mlp_bias"] = config.mlp_bias
    if stop_ids:
        result["eos_token_id"] = list(stop_ids)
    return result


def _rope_scaling_to_hf(rope: RopeConfig) -> dict[str, Any] | None:
    keys = {
        "default": [],
        "linear": ["factor"],
        "llama3": [
            "factor",
            "original_max_position_embeddings",
            "low_freq_factor",
            "high_freq_factor",
        ],
        "yarn": [
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ],
    }[rope.rope_type]
    if not keys:
        return None
    values = {key: getattr(rope, key) for key in keys}
    present = {key: value for key, value in values.items() if value is not None}
    return {"rope_type": rope.rope_type, **present}


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
