"""Random checkpoints that both sides can make for themselves from a seed.

NumPy's `RandomState` streams are frozen by its compatibility policy, so a golden file
needs no weights: a configuration, a seed and the results are enough. This module is
imported by the oracle too and must stay NumPy-only and old-Python-friendly.
"""

import numpy as np


def tensor_shapes(config):
    """Names and shapes of the tensors of a Hugging Face Llama or Qwen3 checkpoint."""
    D, F, V = (
        config["hidden_size"],
        config["intermediate_size"],
        config["vocab_size"],
    )
    N, K = config["num_attention_heads"], config["num_key_value_heads"]
    H = config["head_dim"]
    attention_bias = config.get("attention_bias", False)
    mlp_bias = config.get("mlp_bias", False)
    shapes = {"model.embed_tokens.weight": (V, D)}

    def linear(name, d_in, d_out, bias):
        shapes[name + ".weight"] = (d_out, d_in)
        if bias:
            shapes[name + ".bias"] = (d_out,)

    for index in range(config["num_hidden_layers"]):
        layer = "model.layers.%d." % index  # noqa: UP031
        shapes[layer + "input_layernorm.weight"] = (D,)
        linear(layer + "self_attn.q_proj", D, N * H, attention_bias)
        linear(layer + "self_attn.k_proj", D, K * H, attention_bias)
        linear(layer + "self_attn.v_proj", D, K * H, attention_bias)
        linear(layer + "self_attn.o_proj", N * H, D, attention_bias)
        if config["model_type"] == "qwen3":
            shapes[layer + "self_attn.q_norm.weight"] = (H,)
            shapes[layer + "self_attn.k_norm.weight"] = (H,)
        shapes[layer + "post_attention_layernorm.weight"] = (D,)
        linear(layer + "mlp.gate_proj", D, F, mlp_bias)
        linear(layer + "mlp.up_proj", D, F, mlp_bias)
        linear(layer + "mlp.down_proj", F, D, mlp_bias)
    shapes["model.norm.weight"] = (D,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (V, D)
    return shapes


def random_weights(config, seed):
    """float32 weights whose logits spread over about -8..8.

    Nothing is left at a neutral value: norm weights are 0.5..1.5 and biases are random,
    so that dropping one of them shows.
    """
    random = np.random.RandomState(seed)
    weights = {}
    for name, shape in tensor_shapes(config).items():
        if "norm" in name:
            value = random.uniform(0.5, 1.5, shape)
        elif name.endswith("bias"):
            value = 0.3 * random.standard_normal(shape)
        else:
            gain = 2.0 if "embed" in name or "lm_head" in name else 1.0
            value = gain * shape[1] ** -0.5 * random.standard_normal(shape)
        weights[name] = value.astype(np.float32)
    return weights
