"""`config.json` in both spellings becomes the same architecture, and back."""

import jax.numpy as jnp
import pytest

from jaxspark.checkpoints import CheckpointError
from jaxspark.checkpoints.hf_config import (
    dense_config_from_hf,
    dense_config_to_hf,
    stop_ids_from_hf,
)
from jaxspark.models import RopeConfig
from tests.checkpoints.tiny import LLAMA, QWEN3, dense

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
ROPES = {
    "linear": RopeConfig(rope_type="linear", factor=2.0),
    "llama3": RopeConfig(**LLAMA3_ROPE),
    "yarn": RopeConfig(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=32
    ),
    "default": RopeConfig(rope_theta=5e5),
}


def without(config, key):
    return {k: v for k, v in config.items() if k != key}


def test_llama_and_qwen3_differ_in_the_qk_norm():
    assert dense_config_from_hf(LLAMA) == dense()
    assert dense_config_from_hf(QWEN3) == dense(qk_norm=True)


def test_v4_and_v5_spell_the_same_rope():
    v4 = LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}
    old = {**without(LLAMA3_ROPE, "rope_type"), "type": "llama3"}
    v4_old = LLAMA | {"rope_theta": 5e5, "rope_scaling": old}
    v5 = without(LLAMA, "rope_theta") | {
        "rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5}
    }
    expected = RopeConfig(rope_theta=5e5, **LLAMA3_ROPE)
    for config in (v4, v4_old, v5):
        assert dense_config_from_hf(config).rope == expected


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_an_exported_configuration_reads_back_equal(name, qk_norm):
    config = dense(rope=ROPES[name], qk_norm=qk_norm, attention_bias=True)
    exported = dense_config_to_hf(config, dtype=jnp.float32)
    assert dense_config_from_hf(exported) == config


def test_rope_scaling_counts_beside_rope_parameters_that_agree():
    plain = {"rope_type": "default", "rope_theta": 1e4}
    for config in (
        LLAMA | {"rope_scaling": YARN, "rope_parameters": plain},
        LLAMA | {"rope_scaling": YARN, "rope_parameters": YARN | {"rope_theta": 1e4}},
        LLAMA | {"rope_scaling": YARN, "rope_parameters": {}},
        LLAMA | {"rope_scaling": {}, "rope_parameters": YARN},
        LLAMA | {"rope_scaling": None, "rope_parameters": YARN},
        LLAMA | {"rope_scaling": YARN, "original_max_position_embeddings": 32},
        LLAMA | {"rope_scaling": YARN | {"finetuned": True, "mscale": None}},
    ):
        assert dense_config_from_hf(config).rope == RopeConfig(rope_theta=1e4, **YARN)


@pytest.mark.parametrize(
    "scaling, parameters",
    [
        (YARN, {"rope_type": "default", "rope_theta": 1e6}),
        (YARN, YARN | {"factor": 2.0}),
        ({"rope_type": "default"}, YARN),
        (LLAMA3_ROPE, YARN),
    ],
)
def test_rope_settings_that_contradict_each_other_are_refused(scaling, parameters):
    """transformers would take the first and forget the second, its theta too."""
    both = {"rope_scaling": scaling, "rope_parameters": parameters}
    with pytest.raises(CheckpointError, match="rope_scaling .* contradict each other"):
        dense_config_from_hf(LLAMA | both)


def test_the_theta_among_the_rope_parameters_counts():
    inside = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    rope = dense_config_from_hf(LLAMA | {"rope_theta": 1e4} | inside).rope
    assert rope == RopeConfig(rope_theta=1e6)


def test_keys_that_the_classes_do_not_read_change_nothing():
    """As in transformers, whose Llama and Qwen3 know no such multipliers."""
    foreign = {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "pretraining_tp": 2}
    assert dense_config_from_hf(LLAMA | foreign) == dense_config_from_hf(LLAMA)
    assert dense_config_from_hf(LLAMA | {"hidden_act": "swish"}) == dense()


def test_the_original_context_defaults_to_the_positions():
    yarn = {"rope_type": "yarn", "factor": 4.0}
    rope = dense_config_from_hf(LLAMA | {"rope_scaling": yarn}).rope
    assert rope.original_max_position_embeddings == LLAMA["max_position_embeddings"]


def test_yarn_without_a_factor_takes_the_ratio_of_contexts():
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 32}
    assert dense_config_from_hf(LLAMA | {"rope_scaling": yarn}).rope.factor == 4.0


def test_absent_optional_keys_have_the_defaults_of_transformers():
    bare = without(without(LLAMA, "head_dim"), "num_key_value_heads")
    config = dense_config_from_hf(without(bare, "rope_theta"))
    assert (config.head_dim, config.num_key_value_heads) == (8, 4)
    assert config.rope.rope_theta == 10000.0
    assert dense_config_from_hf(without(QWEN3, "head_dim")).head_dim == 128


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"architectures": ["MambaForCausalLM"]}, "architectures.*Mamba.*Llama"),
        ({"architectures": 7}, "architectures is 7"),
        ({"architectures": None, "model_type": "gpt2"}, "model_type.*gpt2.*qwen3"),
        ({"hidden_size": None}, "hidden_size is None, expected an integer"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"hidden_size": 10**40}, "hidden_size.*below 2"),
        ({"hidden_size": 30, "head_dim": None}, "hidden_size is 30.*multiple"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0.*at least 1"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3"),
        ({"head_dim": 7}, "head_dim must be even.*7"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"rope_theta": 10**400}, "rope_theta is 1000.*, expected a positive number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types.*full_attention"),
        ({"layer_types": 3}, "layer_types is 3"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope.*expected one of"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', expected an object"),
        ({"partial_rotary_factor": 0.5, "rope_scaling": {"factor": 1}}, "partial"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "all layers"),
        ({"is_causal": False}, "is_causal is False, expected true"),
        ({"model_type": "granite"}, "model_type is 'granite', expected one of"),
        ({"model_type": "qwen3"}, "architectures is .*Llama.*, expected .*Qwen3"),
        ({"rope_scaling": YARN | {"attn_factor": 2}}, "attn_factor is 2.*type yarn"),
        ({"rope_scaling": {"factor": 4.0}}, "factor is 4.0.*type default"),
        ({"rope_scaling": YARN | {"short_factor": [1.0]}}, "short_factor is"),
        ({"rope_scaling": YARN | {"truncate": None}}, "truncate is None"),
        ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "partial"),
        ({"rope_scaling": YARN | {"attention_factor": "1"}}, "attention_factor is '1'"),
        ({"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, "more than low"),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 64},
            "original_max_position_embeddings is 32, expected 64, as beside",
        ),
    ],
)
def test_what_is_not_supported_is_named(changes, words):
    with pytest.raises(CheckpointError, match=words):
        dense_config_from_hf(LLAMA | changes)


def test_stop_ids_come_from_the_first_configuration_that_has_any():
    assert stop_ids_from_hf({"eos_token_id": [5, 6]}, {"eos_token_id": 1}) == (5, 6)
    assert stop_ids_from_hf({}, {"eos_token_id": 0}) == (0,)
    assert stop_ids_from_hf({}, {}) == ()
    with pytest.raises(CheckpointError, match="eos_token_id is '2'"):
        stop_ids_from_hf({"eos_token_id": "2"})
