"""Tiny DeepSeek-V4 configurations whose every branch is alive at short lengths."""

import numpy as np

SLIDING, CSA, HCA = (
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
)
BASE = {
    "model_type": "deepseek_v4",
    "vocab_size": 61,
    "hidden_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 16,
    "o_groups": 2,
    "o_lora_rank": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 2.0,
    "scoring_func": "sqrtsoftplus",
    "layer_types": [SLIDING, CSA, HCA, CSA, HCA],
    "num_hash_layers": 1,
    "index_n_heads": 16,
    "index_head_dim": 8,
    "index_topk": 5,
    "sliding_window": 16,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_scaling": {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}


# Of the golden files.
V4_SEEDS, V4_LENGTHS = (1, 2, 3), (140, 33, 5)


def lengths(config):
    """Around every boundary: compression, window, index top-k, HCA."""
    window, picks = config["sliding_window"], 4 * config["index_topk"]
    near = {1, 3, 4, 5, window - 1, window, window + 1}
    near |= {picks - 1, picks, picks + 1, 127, 128, 129, 300}
    return sorted(near)


def random_config(seed):
    """A configuration drawn at random; every layer kind occurs."""
    random = np.random.default_rng(seed)

    def one(*values):
        return values[random.integers(len(values))]

    kinds = [one(SLIDING, CSA, HCA) for _ in range(one(0, 1, 2))]
    kinds += [SLIDING, CSA, HCA] if random.random() < 0.5 else [HCA, CSA, HCA, CSA]
    groups = one(1, 2, 4)
    turning = one(4, 8)
    config = BASE | {
        "hidden_size": one(24, 32, 40),
        "moe_intermediate_size": one(8, 16, 20),
        "num_attention_heads": groups * one(1, 2),
        "o_groups": groups,
        "head_dim": one(12, 16, 24),
        "qk_rope_head_dim": turning,
        "q_lora_rank": one(8, 16),
        "o_lora_rank": one(4, 8),
        "n_routed_experts": one(5, 8, 12),
        "num_experts_per_tok": one(1, 2, 3),
        "routed_scaling_factor": one(1.0, 1.5, 2.5),
        "swiglu_limit": one(1.0, 3.0, 10.0),
        "layer_types": kinds,
        "num_hidden_layers": len(kinds),
        "num_hash_layers": int(random.integers(len(kinds))),
        "index_n_heads": one(16, 24),
        "index_head_dim": one(8, 12),
        "index_topk": one(3, 5, 9),
        "sliding_window": one(8, 16, 24),
        "hc_mult": one(2, 4),
        "hc_sinkhorn_iters": one(1, 3, 20),
    }
    if random.random() < 0.3:
        config["rope_scaling"] = {"rope_type": "default"}
    return config
