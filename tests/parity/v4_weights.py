"""Random DeepSeek-V4 checkpoints that both sides can make from a seed (see `weights`).

Names are those of transformers' modules. NumPy-only and old-Python-friendly: the oracle
imports it too.
"""

import numpy as np

RATES = {
    "sliding_attention": 0,
    "compressed_sparse_attention": 4,
    "heavily_compressed_attention": 128,
}


def tensor_shapes(config):
    """Names and shapes of parameters and persistent buffers."""
    D, V = config["hidden_size"], config["vocab_size"]
    N, H, R = (config[k] for k in ("num_attention_heads", "head_dim", "q_lora_rank"))
    E, F = config["n_routed_experts"], config["moe_intermediate_size"]
    M, G, low = config["hc_mult"], config["o_groups"], config["o_lora_rank"]
    rates = RATES | config.get("compress_rates", {})
    shapes = {"model.embed_tokens.weight": (V, D)}

    def hyper(name):
        shapes[name + ".fn"] = ((2 + M) * M, M * D)
        shapes[name + ".base"] = ((2 + M) * M,)
        shapes[name + ".scale"] = (3,)

    def compressor(name, rate, width, series):
        shapes[name + ".position_bias"] = (rate, series * width)
        shapes[name + ".kv_proj.weight"] = (series * width, D)
        shapes[name + ".gate_proj.weight"] = (series * width, D)
        shapes[name + ".kv_norm.weight"] = (width,)

    for index, kind in enumerate(config["layer_types"]):
        layer = "model.layers.%d." % index  # noqa: UP031
        attn, rate = layer + "self_attn.", rates[kind]
        shapes[attn + "sinks"] = (N,)
        shapes[attn + "q_a_proj.weight"] = (R, D)
        shapes[attn + "q_a_norm.weight"] = (R,)
        shapes[attn + "q_b_proj.weight"] = (N * H, R)
        shapes[attn + "kv_proj.weight"] = (H, D)
        shapes[attn + "kv_norm.weight"] = (H,)
        shapes[attn + "o_a_proj.weight"] = (G * low, N * H // G)
        shapes[attn + "o_b_proj.weight"] = (D, G * low)
        sparse = kind == "compressed_sparse_attention"
        if rate:
            compressor(attn + "compressor", rate, H, 1 + sparse)
        if sparse:
            name = attn + "compressor.indexer"
            heads, width = config["index_n_heads"], config["index_head_dim"]
            compressor(name, rate, width, 2)
            shapes[name + ".q_b_proj.weight"] = (heads * width, R)
            shapes[name + ".scorer.weights_proj.weight"] = (heads, D)
        shapes[layer + "mlp.gate.weight"] = (E, D)
        if index < config["num_hash_layers"]:
            shapes[layer + "mlp.gate.tid2eid"] = (V, config["num_experts_per_tok"])
        else:
            shapes[layer + "mlp.gate.e_score_correction_bias"] = (E,)
        shapes[layer + "mlp.experts.gate_up_proj"] = (E, 2 * F, D)
        shapes[layer + "mlp.experts.down_proj"] = (E, D, F)
        for which, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
            shapes[layer + "mlp.shared_experts.%s_proj.weight" % which] = shape  # noqa: UP031
        shapes[layer + "input_layernorm.weight"] = (D,)
        shapes[layer + "post_attention_layernorm.weight"] = (D,)
        hyper(layer + "attn_hc")
        hyper(layer + "ffn_hc")
    shapes["model.norm.weight"] = (D,)
    shapes["model.hc_head.hc_fn"] = (M, M * D)
    shapes["model.hc_head.hc_base"] = (M,)
    shapes["model.hc_head.hc_scale"] = (1,)
    shapes["lm_head.weight"] = (V, D)
    return shapes


def random_weights(config, seed):
    """float32 weights of a lively model: nothing is left at a neutral value."""
    random = np.random.RandomState(seed)
    weights = {}
    for name, shape in tensor_shapes(config).items():
        last = name.rsplit(".", 1)[-1]
        if last == "tid2eid":
            E = config["n_routed_experts"]
            order = np.argsort(random.random_sample((shape[0], E)), axis=1)
            weights[name] = order[:, : shape[1]].astype(np.int64)
            continue
        if "norm" in name or last in ("scale", "hc_scale"):
            value = random.uniform(0.5, 1.5, shape)
        elif last in ("base", "hc_base", "sinks", "e_score_correction_bias"):
            value = 0.5 * random.standard_normal(shape)
        elif last == "position_bias":
            value = random.standard_normal(shape)
        else:
            gain = 2.0 if "embed" in name else 1.0
            gain = 4.0 if "mlp.gate.weight" in name else gain
            # Experts strong enough that some of what they gate is clamped.
            gain = 2.0 if name.endswith(("gate_up_proj", "up_proj.weight")) else gain
            value = gain * shape[-1] ** -0.5 * random.standard_normal(shape)
        weights[name] = value.astype(np.float32)
    return weights
