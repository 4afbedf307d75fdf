"""Target architectures by name."""

from jaxspark.models import DenseConfig, RopeConfig


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
