"""DeepSeek-V4's `config.json` <-> `DeepSeekV4Config`, in both spellings.

The released files give `compress_ratios` (with entries for the draft layers at their
end), `num_hash_layers` and `rope_scaling`; transformers writes `layer_types`,
`mlp_layer_types`, `compress_rates` and nested `rope_parameters`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from jaxspark.checkpoints.fields import Fields
from jaxspark.checkpoints.rope_settings import (
    contradiction,
    read_rope,
    rope_scaling_to_hf,
    rope_tables,
)
from jaxspark.errors import CheckpointError
from jaxspark.models.deepseek_v4_config import DeepSeekV4Config
from jaxspark.models.layers.rope import RopeConfig

MODEL_TYPE, ARCHITECTURE = "deepseek_v4", "DeepseekV4ForCausalLM"
CSA, HCA = "compressed_sparse_attention", "heavily_compressed_attention"
_SIZES = (
    "vocab_size",
    "hidden_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "n_routed_experts",
    "num_experts_per_tok",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "n_shared_experts",
    "sliding_window",
    "hc_mult",
    "hc_sinkhorn_iters",
    "max_position_embeddings",
)
_ROPES = ("default", "yarn")
_NUMBERS = ("routed_scaling_factor", "swiglu_limit", "hc_eps", "rms_norm_eps")
# What the model computes one way only, and what each key must say.
_FIXED = {
    "hidden_act": "silu",
    "scoring_func": "sqrtsoftplus",
    "num_key_value_heads": 1,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


def is_v4(config: Mapping[str, Any]) -> bool:
    """Whether a parsed `config.json` says that it is of such a model."""
    architectures = config.get("architectures") or ()
    return config.get("model_type") == MODEL_TYPE or ARCHITECTURE in architectures


def v4_config_from_hf(
    config: Mapping[str, Any], *, where: str = "config.json"
) -> DeepSeekV4Config:
    """The architecture from a parsed `config.json`, released or transformers'.

    Raises:
      CheckpointError: another model, an unsupported feature, a missing key or a value
        of the wrong type; names key, value and what was expected.
    """
    fields = Fields(config, where)
    if fields.text("model_type") != MODEL_TYPE:
        raise fields.wrong("model_type", repr(MODEL_TYPE))
    for key, value in _FIXED.items():
        if key in fields and fields.values[key] != value:
            raise fields.wrong(key, repr(value))
    rates = fields.table("compress_rates") or Fields({}, where)
    csa = rates.integer(CSA, fields.integer("compress_rate_csa", 4))
    hca = rates.integer(HCA, fields.integer("compress_rate_hca", 128))
    plain, compressed = _ropes(fields)
    values: dict[str, Any] = {key: fields.integer(key) for key in _SIZES}
    values |= {key: fields.number(key) for key in _NUMBERS}
    try:
        return DeepSeekV4Config(
            **values,
            qk_rope_head_dim=_turning(fields),
            compress_ratios=_ratios(fields, {CSA: csa, HCA: hca}),
            num_hash_layers=_hash_layers(fields),
            csa_ratio=csa,
            hca_ratio=hca,
            rope=plain,
            compress_rope=compressed,
            initializer_range=fields.number("initializer_range", 0.02),
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _turning(fields: Fields) -> int:
    """Channels of a head that turn, said as a number, a share, or both."""
    width = fields.integer("head_dim")
    turning = fields.integer("qk_rope_head_dim", width // 8)
    if "partial_rotary_factor" not in fields:
        return turning
    share = fields.number("partial_rotary_factor")
    if "qk_rope_head_dim" in fields and not _is_share(share, turning, width):
        raise fields.wrong("partial_rotary_factor", f"{turning}/{width}")
    return turning if _is_share(share, turning, width) else int(width * share)


def _is_share(share: float, part: int, whole: int) -> bool:
    return share == part / whole or int(whole * share) == part


def _ratios(fields: Fields, rates: Mapping[str, int]) -> tuple[int, ...]:
    depth = fields.integer("num_hidden_layers")
    kinds = fields.values.get("layer_types")
    if kinds is None:
        ratios = fields.integers("compress_ratios")
        if len(ratios) < depth:
            raise fields.wrong("compress_ratios", f"at least {depth} numbers")
        return ratios[:depth]
    names = {"sliding_attention": 0} | dict(rates)
    if (
        not isinstance(kinds, list)
        or len(kinds) < depth
        or not set(kinds) <= set(names)
    ):
        raise fields.wrong("layer_types", f"one of {list(names)} for each of {depth}")
    return tuple(names[kind] for kind in kinds[:depth])


def _hash_layers(fields: Fields) -> int:
    kinds = fields.values.get("mlp_layer_types")
    if kinds is None:
        return fields.integer("num_hash_layers", 3, least=0)
    count = sum(kind == "hash_moe" for kind in kinds)
    if kinds != ["hash_moe"] * count + ["moe"] * (len(kinds) - count):
        raise fields.wrong("mlp_layer_types", "'hash_moe' for the first layers only")
    return count


def _ropes(fields: Fields) -> tuple[RopeConfig, RopeConfig]:
    """Rope of window layers, and of layers with entries."""
    read = [_read_ropes(fields, table) for table in rope_tables(fields)]
    plain = _read_ropes(fields, Fields({}, fields.where))
    if len(read) == 2 and read[1] not in (read[0], plain):
        raise contradiction(fields)
    return read[0] if read else plain


def _read_ropes(fields: Fields, rope: Fields) -> tuple[RopeConfig, RopeConfig]:
    main, compress = rope.table("main"), rope.table("compress")
    if main is not None and compress is not None:
        return _nested_rope(fields, main), _nested_rope(fields, compress)
    theta = fields.number("rope_theta", 10000.0)
    compress_theta = fields.number("compress_rope_theta", 160000.0)
    if rope.number("rope_theta", theta) not in (theta, compress_theta):
        raise rope.wrong("rope_theta", f"{theta} or {compress_theta}, as beside it")
    scaled = read_rope(rope, fields, compress_theta, _ROPES)
    if scaled.rope_type == "yarn" and scaled.attention_factor is None:
        # The released models do not scale cos and sin, whatever YaRN says.
        scaled = replace(scaled, attention_factor=1.0)
    return RopeConfig(rope_theta=theta), scaled


def _nested_rope(fields: Fields, rope: Fields) -> RopeConfig:
    width, turning = fields.integer("head_dim"), _turning(fields)
    share = rope.number("partial_rotary_factor", turning / width)
    if not _is_share(share, turning, width):
        raise rope.wrong("partial_rotary_factor", f"{turning}/{width}")
    return read_rope(rope, fields, rope.number("rope_theta"), _ROPES)


def v4_config_to_hf(
    config: DeepSeekV4Config, *, dtype, stop_ids: tuple[int, ...] = ()
) -> dict[str, Any]:
    """A `config.json` that both the released code's and transformers' readers take.

    Raises:
      CheckpointError: rope that it cannot say.
    """
    rope = config.compress_rope
    scaling = rope_scaling_to_hf(rope) or {"rope_type": "default"}
    if rope.rope_type == "yarn":
        scaling["type"] = "yarn"  # as the released code calls it
        # Never left out: absent, it is 1 for some readers and YaRN's own for others.
        scaling["attention_factor"] = rope.frequencies(config.qk_rope_head_dim)[1]
    if config.rope.rope_type != "default":
        raise CheckpointError(
            f"rope of window layers is {config.rope.rope_type}, expected default: the "
            "released form has no other"
        )
    result = {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "torch_dtype": jnp.dtype(dtype).name,
        **{key: getattr(config, key) for key in (*_SIZES, *_NUMBERS)},
        **_FIXED,
        "num_hidden_layers": config.num_hidden_layers,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "compress_ratios": list(config.compress_ratios),
        "num_hash_layers": config.num_hash_layers,
        "rope_theta": config.rope.rope_theta,
        "compress_rope_theta": rope.rope_theta,
        "rope_scaling": scaling,
        "initializer_range": config.initializer_range,
    }
    if (config.csa_ratio, config.hca_ratio) != (4, 128):
        result["compress_rate_csa"] = config.csa_ratio
        result["compress_rate_hca"] = config.hca_ratio
    if stop_ids:
        result["eos_token_id"] = list(stop_ids)
    return result
