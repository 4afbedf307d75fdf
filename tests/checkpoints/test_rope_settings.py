"""Any mixture of rope settings gives the rope of transformers, or an error."""

import json
import logging
import random

import jax.numpy as jnp
import numpy as np
import pytest

from jaxspark.checkpoints import CheckpointError
from jaxspark.checkpoints.deepseek_v4_config import v4_config_from_hf, v4_config_to_hf
from jaxspark.checkpoints.hf_config import dense_config_from_hf
from jaxspark.configs.targets import deepseek_v4_tiny
from jaxspark.models import RopeConfig
from tests.checkpoints.tiny import LLAMA, QWEN3

KEYS = ("rope_type", "type", "rope_theta", "factor", "attention_factor", "beta_fast",
        "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim", "truncate",
        "original_max_position_embeddings", "finetuned", "attn_factor")  # fmt: skip
VALUES = {
    "rope_type": ["default", "linear", "llama3", "yarn", "dynamic", "longrope"],
    "type": ["linear", "yarn"],
    "rope_theta": [1e4, 1e6],
    "original_max_position_embeddings": [32, 64],
    "truncate": [True, False],
    "low_freq_factor": [1.0],
    "high_freq_factor": [4.0],
    "finetuned": [True],
}


def table(draw: random.Random) -> dict:
    """A table of settings such as people and programs write, sometimes with errors."""
    kind = draw.choice(["default", "linear", "llama3", "yarn", "yarn"])
    good = {
        "default": {},
        "linear": {"factor": 2.0},
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "yarn": {"factor": 4.0},
    }[kind]
    result = {draw.choice(["rope_type", "rope_type", "type"]): kind, **good}
    for key in draw.sample(KEYS, draw.choice([0, 0, 1, 1, 2, 3])):
        result[key] = draw.choice(VALUES.get(key, [2.0, 1.0, None]))
    return result


def settings(draw: random.Random) -> dict:
    """One or both tables, and keys beside them."""
    found = {}
    for key in draw.choice([("rope_scaling",), ("rope_parameters",)] * 2 + [()]):
        found[key] = table(draw)
    if draw.random() < 0.4:
        both = table(draw)
        found |= {"rope_scaling": both, "rope_parameters": dict(both)}
        if draw.random() < 0.7:
            found["rope_parameters"] = draw.choice([table(draw), {}, None])
    for key in ("rope_theta", "original_max_position_embeddings"):
        if draw.random() < 0.4:
            found[key] = draw.choice(VALUES[key])
    return found


def theirs(classes, config: dict) -> RopeConfig | None:
    """What transformers makes of it; None where it fails or knows no such type."""
    copy = json.loads(json.dumps(config))
    try:
        read = classes[config["model_type"]].from_dict(copy)
        # Its rope functions do this again, and the keys beside the table count then.
        read.standardize_rope_params()
        values = {k: v for k, v in read.rope_parameters.items() if v is not None}
        if values["rope_type"] == "yarn":
            context = values["original_max_position_embeddings"]
            values.setdefault("factor", read.max_position_embeddings / context)
        known = RopeConfig.__dataclass_fields__
        return RopeConfig(**{k: v for k, v in values.items() if k in known})
    except (KeyError, ValueError, TypeError):
        return None


def test_settings_mean_what_transformers_takes_them_for(seed):
    transformers = pytest.importorskip("transformers")
    classes = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}
    draw, read = random.Random(seed), 0
    logging.disable(logging.WARNING)
    try:
        for _ in range(1000):
            base = draw.choice([LLAMA, QWEN3])
            plain = {key: base[key] for key in base if key != "rope_theta"}
            config = plain | settings(draw)
            try:
                mine = dense_config_from_hf(config).rope
            except CheckpointError:
                continue
            expected = theirs(classes, config)
            if mine.rope_type == "yarn" and expected is None:
                continue  # Without a factor, here the ratio of the context lengths.
            assert expected is not None, f"{seed=} {config}"
            read += 1
            ours, scale = mine.frequencies(16)
            other, its_scale = expected.frequencies(16)
            np.testing.assert_array_equal(ours, other, err_msg=f"{seed=} {config}")
            assert scale == its_scale, f"{seed=} {config}"
    finally:
        logging.disable(logging.NOTSET)
    assert read > 250, f"{seed=}: most settings were refused"


V4 = v4_config_to_hf(deepseek_v4_tiny(61), dtype=jnp.float32)
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64}


def v4(**changes):
    """Rope of window layers and of compressed ones."""
    config = v4_config_from_hf(V4 | {"rope_scaling": None} | changes)
    return config.rope, config.compress_rope


def test_deepseek_v4_reads_its_two_ropes_in_either_form():
    plain = RopeConfig(rope_theta=V4["rope_theta"])
    theta = V4["compress_rope_theta"]
    scaled = RopeConfig(rope_theta=theta, attention_factor=1.0, **YARN)
    nested = {
        "main": {"rope_type": "default", "rope_theta": V4["rope_theta"]},
        "compress": YARN | {"rope_theta": theta, "attention_factor": 1.0},
    }
    assert v4(rope_scaling=YARN) == (plain, scaled)
    assert v4(rope_parameters=nested) == (plain, scaled)
    assert v4() == (plain, RopeConfig(rope_theta=theta))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": YARN | {"attn_factor": 2.0}}, "attn_factor is 2.0"),
        (
            {"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 2.0}},
            "contradict",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type is 'linear'"),
        ({"rope_scaling": YARN | {"rope_theta": 5.0}}, "rope_theta is 5.0"),
        ({"rope_parameters": {"main": {}, "compress": YARN}}, "rope_theta is missing"),
        ({"partial_rotary_factor": 0.75}, "partial_rotary_factor is 0.75"),
        ({"rope_scaling": YARN | {"attention_factor": 1.5}}, "cos and sin by 1.5"),
        ({"mlp_bias": True}, "mlp_bias is True"),
    ],
)
def test_deepseek_v4_names_what_it_does_not_compute(changes, words):
    with pytest.raises(CheckpointError, match=words):
        v4(**changes)


def test_deepseek_v4_writes_every_rope_it_reads_or_refuses():
    for rope in (YARN, YARN | {"beta_fast": 16.0, "truncate": False}):
        config = v4_config_from_hf(V4 | {"rope_scaling": rope})
        assert v4_config_from_hf(v4_config_to_hf(config, dtype=jnp.float32)) == config
    main = YARN | {"rope_theta": 1e4, "attention_factor": 1.0}
    nested = {"main": main, "compress": main}
    config = v4_config_from_hf(V4 | {"rope_scaling": None, "rope_parameters": nested})
    with pytest.raises(
        CheckpointError, match="window layers is yarn, expected default"
    ):
        v4_config_to_hf(config, dtype=jnp.float32)
