"""Target architectures by name."""

from dataclasses import replace

from jaxspark.models import DeepSeekV4Config, DenseConfig, RopeConfig


def smollm2_135m() -> DenseConfig:
    """SmolLM2-135M-Instruct, the embedded default (Apache-2.0)."""
    return DenseConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope=RopeConfig(rope_theta=1e5),
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


def tiny_llama(vocab_size: int = 97) -> DenseConfig:
    """A Llama of three small layers, for tests."""
    return DenseConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
    )


def tiny_qwen3(vocab_size: int = 97) -> DenseConfig:
    """A Qwen3 of three small layers (q/k norm, heads wider than D/N), for tests."""
    return DenseConfig(
        vocab_size=vocab_size,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        qk_norm=True,
    )


def deepseek_v4_flash() -> DeepSeekV4Config:
    """DeepSeek-V4-Flash: 284 B parameters, 13 B active."""
    return DeepSeekV4Config(
        vocab_size=129280,
        hidden_size=4096,
        moe_intermediate_size=2048,
        num_attention_heads=64,
        head_dim=512,
        qk_rope_head_dim=64,
        q_lora_rank=1024,
        o_groups=8,
        o_lora_rank=1024,
        n_routed_experts=256,
        num_experts_per_tok=6,
        routed_scaling_factor=1.5,
        compress_ratios=(0, 0) + 20 * (4, 128) + (4,),
        index_n_heads=64,
        index_head_dim=128,
        index_topk=512,
    )


def deepseek_v4_pro() -> DeepSeekV4Config:
    """DeepSeek-V4-Pro: 1.6 T parameters, 49 B active."""
    return replace(
        deepseek_v4_flash(),
        hidden_size=7168,
        moe_intermediate_size=3072,
        num_attention_heads=128,
        q_lora_rank=1536,
        o_groups=16,
        n_routed_experts=384,
        routed_scaling_factor=2.5,
        compress_ratios=(128, 128) + 29 * (4, 128) + (4,),
        index_topk=1024,
    )


def deepseek_v4_mini(vocab_size: int = 16384) -> DeepSeekV4Config:
    """A DeepSeek-V4 of about 100 M parameters, to train on one accelerator."""
    return DeepSeekV4Config(
        vocab_size=vocab_size,
        hidden_size=512,
        moe_intermediate_size=160,
        num_attention_heads=8,
        head_dim=128,
        qk_rope_head_dim=32,
        q_lora_rank=256,
        o_groups=4,
        o_lora_rank=128,
        n_routed_experts=24,
        num_experts_per_tok=4,
        compress_ratios=(0, 0) + 5 * (4, 128),
        num_hash_layers=2,
        index_n_heads=16,
        index_head_dim=64,
        index_topk=64,
        max_position_embeddings=16384,
    )


def deepseek_v4_tiny(vocab_size: int = 4096) -> DeepSeekV4Config:
    """A DeepSeek-V4 of a few million parameters; short texts reach every branch."""
    return DeepSeekV4Config(
        vocab_size=vocab_size,
        hidden_size=128,
        moe_intermediate_size=64,
        num_attention_heads=4,
        head_dim=32,
        qk_rope_head_dim=16,
        q_lora_rank=64,
        o_groups=2,
        o_lora_rank=32,
        n_routed_experts=16,
        num_experts_per_tok=2,
        compress_ratios=(0, 4, 32, 4, 32, 4),
        num_hash_layers=1,
        index_n_heads=16,
        index_head_dim=16,
        index_topk=8,
        sliding_window=16,
        hca_ratio=32,
        compress_rope=RopeConfig(
            rope_type="yarn",
            rope_theta=160000.0,
            factor=4.0,
            original_max_position_embeddings=256,
            attention_factor=1.0,
        ),
        max_position_embeddings=1024,
    )
