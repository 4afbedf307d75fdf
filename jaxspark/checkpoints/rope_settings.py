"""Rope in Hugging Face configurations <-> `RopeConfig`.

transformers v4 writes `rope_theta` and `rope_scaling` (whose type is `rope_type` or,
older, `type`), v5 `rope_parameters` with the theta inside. Of two tables v5 takes
`rope_scaling` and forgets the other, the theta in it too: here they must not contradict
each other. A key that the type does not know is an error, never ignored.
"""

from collections.abc import Sequence
from typing import Any

from jaxspark.checkpoints.fields import Fields
from jaxspark.errors import CheckpointError
from jaxspark.models.layers.rope import ROPE_TYPES, RopeConfig

_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
# `finetuned` tells how a model was made and changes nothing.
_ALWAYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned")


def rope_tables(fields: Fields) -> list[Fields]:
    """The tables of rope settings that say something, the one that counts first."""
    tables = [fields.table(key) for key in ("rope_scaling", "rope_parameters")]
    return [table for table in tables if table is not None and table.values]


def rope_from_hf(fields: Fields) -> RopeConfig:
    """The rope of a model whose layers all have the same.

    Raises:
      CheckpointError: an unknown type or key, a missing or wrong value, a rotation of a
        part of each head, or settings that contradict each other.
    """
    _reject_partial(fields)
    theta = fields.number("rope_theta", 10000.0)
    ropes = []
    for table in rope_tables(fields):
        _reject_partial(table)
        ropes.append(read_rope(table, fields, table.number("rope_theta", theta)))
    if not ropes:
        return RopeConfig(rope_theta=theta)
    rope, *others = ropes
    for other in others:
        if other not in (rope, RopeConfig(rope_theta=rope.rope_theta)):
            raise contradiction(fields)
    return rope


def contradiction(fields: Fields) -> CheckpointError:
    """The error for `rope_scaling` and `rope_parameters` of which one must be wrong."""
    scaling, parameters = rope_tables(fields)
    return CheckpointError(
        f"{fields.where}: rope_scaling {dict(scaling.values)} and rope_parameters "
        f"{dict(parameters.values)} (rope_theta {fields.values.get('rope_theta')}) "
        "contradict each other; expected one of them, with its rope_theta"
    )


def _reject_partial(fields: Fields) -> None:
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise fields.wrong("partial_rotary_factor", "1 (whole heads turn)")


def read_rope(
    rope: Fields, fields: Fields, theta: float, kinds: Sequence[str] = ROPE_TYPES
) -> RopeConfig:
    """One table of settings.

    Args:
      rope: the table.
      fields: the configuration that it is in, for the context lengths.
      theta: base of the frequencies.
      kinds: types that the model computes.

    Raises:
      CheckpointError: as `rope_from_hf`.
    """
    if any(isinstance(value, dict) for value in rope.values.values()):
        raise CheckpointError(
            f"{rope.where} is {dict(rope.values)}, expected one set of parameters for "
            "all layers"
        )
    key = "rope_type" if "rope_type" in rope else "type"
    kind = rope.text(key, "default")
    if kind not in kinds:
        raise rope.wrong(key, f"one of {list(kinds)}")
    for name in rope.values:
        if name in rope and name not in (*_KEYS[kind], *_ALWAYS):
            raise rope.wrong(name, f"none: rope of type {kind} knows {_KEYS[kind]}")
    if kind == "default":
        return RopeConfig(rope_theta=theta)
    if kind == "linear":
        return RopeConfig(
            rope_theta=theta, rope_type=kind, factor=rope.number("factor")
        )
    positions = fields.integer("max_position_embeddings")
    original = _original_positions(rope, fields, positions)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if not low < high:
            raise rope.wrong("high_freq_factor", f"more than low_freq_factor {low}")
        return RopeConfig(
            rope_theta=theta,
            rope_type=kind,
            factor=rope.number("factor"),
            original_max_position_embeddings=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    if rope.values.get("truncate", True) is None:
        raise rope.wrong("truncate", "true or false")
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


def _original_positions(rope: Fields, fields: Fields, positions: int) -> int:
    """Within the table or beside it: versions of transformers differ in what counts."""
    key = "original_max_position_embeddings"
    beside = fields.integer(key, positions)
    inside = rope.integer(key, beside)
    if key in fields and inside != beside:
        raise rope.wrong(key, f"{beside}, as beside {rope.where.rpartition(' ')[2]}")
    return inside


def rope_scaling_to_hf(rope: RopeConfig) -> dict[str, Any] | None:
    """The `rope_scaling` of a configuration; None where nothing is scaled."""
    if rope.rope_type == "default":
        return None
    values = {key: getattr(rope, key) for key in _KEYS[rope.rope_type]}
    present = {key: value for key, value in values.items() if value is not None}
    return {"rope_type": rope.rope_type, **present}
