"""Rope in GGUF metadata, read as llama.cpp reads it for Llama and Qwen3.

    type      `rope.scaling.type`, linear where it is absent
    factor    `rope.scaling.factor`, else the older `rope.scale_linear`; 0 and 1: none
    scale     `rope.scaling.attn_factor` multiplies cos and sin beside YaRN's own scale

Converters also write what llama.cpp reads for other architectures only. The slopes of
YaRN's ramp are obeyed; any other such key must say what is computed anyway.
"""

import math
from collections.abc import Collection

import numpy as np

from jaxspark.checkpoints.fields import Fields
from jaxspark.errors import CheckpointError
from jaxspark.models import RopeConfig

_TYPES = ("none", "linear", "yarn")


def rope_from_gguf(
    fields: Fields, arch: str, head_dim: int, divisors_h: np.ndarray | None
) -> RopeConfig:
    """The rope of a file.

    Args:
      fields: the file's metadata.
      arch: what its keys begin with.
      head_dim: width of a head.
      divisors_h: of each frequency [H/2], which a file of Llama 3 stores as a tensor.

    Raises:
      CheckpointError: rope that the decoder does not compute.
    """
    scaling = f"{arch}.rope.scaling"
    theta = float32(fields.number(f"{arch}.rope.freq_base", 10000.0))
    kind = fields.text(f"{scaling}.type", "linear")
    if kind not in _TYPES:
        raise fields.wrong(f"{scaling}.type", f"one of {_TYPES}")
    factor = 1.0 if kind == "none" else _factor(fields, arch)
    if factor == 1.0 and kind == "linear":
        kind = "none"
    if divisors_h is not None and kind != "none":
        raise fields.wrong(f"{scaling}.type", "'none' beside divisors of frequencies")
    attention = float32(fields.number(f"{scaling}.attn_factor", 1.0))
    if attention != 1.0 and kind != "yarn":
        raise fields.wrong(f"{scaling}.attn_factor", f"1 with rope of type {kind}")
    _check_unread(fields, arch, kind, factor)
    if divisors_h is not None:
        return _llama3(fields, theta, head_dim, divisors_h)
    if kind == "none":
        return RopeConfig(rope_theta=theta)
    if kind == "linear":
        return RopeConfig(rope_theta=theta, rope_type=kind, factor=factor)
    return RopeConfig(
        rope_theta=theta,
        rope_type=kind,
        factor=factor,
        original_max_position_embeddings=fields.integer(
            f"{scaling}.original_context_length",
            fields.integer(f"{arch}.context_length"),
        ),
        attention_factor=None if attention == 1.0 else attention * _yarn_scale(factor),
        beta_fast=float32(fields.number(f"{scaling}.yarn_beta_fast", 32.0)),
        beta_slow=float32(fields.number(f"{scaling}.yarn_beta_slow", 1.0)),
    )


def float32(value: float) -> float:
    """The shortest decimal of a stored float32: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def check_neutral(fields: Fields, key: str, values: Collection[float]) -> None:
    """Raises `CheckpointError` unless a key is absent or has one of `values`."""
    seen = fields.values.get(key)
    if seen is None or isinstance(seen, int | float) and float32(seen) in values:
        return
    raise fields.wrong(key, " or ".join(["none", *map(str, values)]))


def _factor(fields: Fields, arch: str) -> float:
    for key in (f"{arch}.rope.scaling.factor", f"{arch}.rope.scale_linear"):
        if key in fields:
            return float32(fields.number(key)) if fields.values[key] else 1.0
    return 1.0


def _yarn_scale(factor: float) -> float:
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def _check_unread(fields: Fields, arch: str, kind: str, factor: float) -> None:
    """Keys that llama.cpp does not read for these architectures say nothing new."""
    neutral: dict[str, tuple[float, ...]] = {
        "rope.scaling.yarn_attn_factor": (1.0,),
        "rope.scaling.yarn_ext_factor": (1.0, 0.0, -1.0),
        "rope.scaling.yarn_log_multiplier": (0.0,),
        "rope.scaling.alpha": (0.0, 1.0),
        "rope.dimension_count_swa": (),
        "rope.freq_base_swa": (),
    }
    if kind == "yarn":
        # Converters write a configuration's attention_factor here: cos and sin's scale.
        neutral["rope.scaling.yarn_attn_factor"] = (float32(_yarn_scale(factor)),)
        neutral["rope.scaling.yarn_ext_factor"] = (1.0, -1.0)
    for name, values in neutral.items():
        check_neutral(fields, f"{arch}.{name}", values)
    sections = fields.values.get(f"{arch}.rope.dimension_sections")
    if sections and any(sections):
        raise fields.wrong(f"{arch}.rope.dimension_sections", "none (plain positions)")


def _llama3(
    fields: Fields, theta: float, head_dim: int, divisors_h: np.ndarray
) -> RopeConfig:
    """Recovers `llama3` parameters from the stored divisor of each frequency.

    The file has no parameters, only their result. All released Llama 3.x models share
    low 1, high 4 and 8192 original positions, and the largest divisor is the factor;
    other divisors are refused, since they would need another form of `RopeConfig`.
    """
    rope = RopeConfig(
        rope_theta=theta,
        rope_type="llama3",
        factor=float(divisors_h.max()),
        original_max_position_embeddings=8192,
    )
    plain_h, _ = RopeConfig(rope_theta=theta).frequencies(head_dim)
    same_size = divisors_h.shape == plain_h.shape
    if same_size and np.isfinite(divisors_h).all() and (divisors_h > 0).all():
        expected_h, _ = rope.frequencies(head_dim)
        if np.allclose(plain_h / divisors_h, expected_h, rtol=1e-4, atol=0):
            return rope
    raise CheckpointError(
        f"{fields.where}: rope_freqs.weight holds divisors that Llama 3.x scaling "
        f"(8192 original positions, factors 1 and 4) does not give for theta {theta} "
        f"and head width {head_dim}"
    )
