"""Tiny configurations that take every branch of the dense family."""

import numpy as np

LLAMA = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
QWEN3 = {key: value for key, value in LLAMA.items() if key != "mlp_bias"} | {
    "model_type": "qwen3",
    "head_dim": 16,  # not D / N
    "rms_norm_eps": 1e-6,
}


def rope(kind, **values):
    """A `rope_parameters` entry."""
    values = {"rope_type": kind, "rope_theta": 10000.0} | values
    return {"rope_parameters": values}


LLAMA3 = rope(
    "llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=32)
YARN_TUNED = rope(
    "yarn",
    factor=4.0,
    original_max_position_embeddings=32,
    attention_factor=1.3,
    beta_fast=16.0,
    beta_slow=2.0,
    truncate=False,
)
YARN_MSCALE = rope(
    "yarn",
    factor=8.0,
    original_max_position_embeddings=32,
    mscale=1.5,
    mscale_all_dim=0.7,
)

CASES = {
    "llama": LLAMA,
    "llama_tied": LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "llama_biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama_linear": LLAMA | rope("linear", factor=4.0) | {"num_key_value_heads": 1},
    "llama_llama3": LLAMA | LLAMA3 | {"head_dim": 32},
    "llama_yarn": LLAMA | YARN,
    "llama_yarn_mscale": LLAMA | YARN_MSCALE | {"tie_word_embeddings": True},
    "qwen3": QWEN3,
    "qwen3_tied_biases": QWEN3 | {"tie_word_embeddings": True, "attention_bias": True},
    "qwen3_yarn": QWEN3 | YARN_TUNED,
}

LENGTHS = (70, 1, 33, 9)


def random_tokens(config, seed, lengths=LENGTHS):
    """One list of token ids for each length."""
    random = np.random.RandomState(seed)
    return [random.randint(0, config["vocab_size"], n).tolist() for n in lengths]
