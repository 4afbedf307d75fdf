"""Draft architectures for a given target, in the proportions DeepSpec releases."""

from dataclasses import replace

import numpy as np

from jaxspark.drafters import DeepSeekV4DSparkConfig, DSparkConfig, Eagle3Config
from jaxspark.models import DeepSeekV4Config, DenseConfig, TargetConfig


def taps(target: TargetConfig, count: int = 5) -> tuple[int, ...]:
    """Layers spread evenly from the second to the third last, as released drafters."""
    last = max(target.num_hidden_layers - 3, 0)
    first = min(1, last)
    return tuple(sorted({round(tap) for tap in np.linspace(first, last, count)}))


def dspark(
    target: TargetConfig,
    *,
    depth: int = 2,
    block_size: int = 7,
    markov_rank: int = 256,
    markov_head_type: str = "vanilla",
    draft_vocab_size: int | None = None,
    mask_token_id: int = 0,
    confidence: bool = True,
) -> DSparkConfig:
    """DSpark: sequential head of the given type and a confidence head that sees it."""
    return DSparkConfig(
        backbone=_backbone(target, depth),
        block_size=block_size,
        target_layer_ids=taps(target),
        mask_token_id=mask_token_id,
        num_target_layers=target.num_hidden_layers,
        markov_rank=markov_rank,
        markov_head_type=markov_head_type,
        enable_confidence_head=confidence,
        confidence_head_with_markov=confidence and markov_rank > 0,
        draft_vocab_size=draft_vocab_size,
    )


def dflash(target: TargetConfig, **options) -> DSparkConfig:
    """DFlash: the same backbone, no sequential head, no confidence."""
    return dspark(target, markov_rank=0, confidence=False, **options)


def eagle3(
    target: TargetConfig,
    *,
    block_size: int = 7,
    draft_vocab_size: int | None = None,
) -> Eagle3Config:
    """Eagle3: one layer, trained for as many steps as it drafts."""
    return Eagle3Config(
        backbone=_backbone(target, 1),
        ttt_length=block_size,
        target_layer_ids=taps(target),
        num_target_layers=target.num_hidden_layers,
        draft_vocab_size=draft_vocab_size,
    )


def _backbone(target: TargetConfig, depth: int) -> DenseConfig:
    """Qwen3 layers, which is what DeepSpec's format holds, of the target's shape."""
    if isinstance(target, DeepSeekV4Config):
        width = target.hidden_size
        # Heads of 128, of less where there would be fewer than four.
        head_dim = next(size for size in (128, 64, 32, 16, 8) if width >= 4 * size)
        heads = width // head_dim
        return DenseConfig(
            vocab_size=target.vocab_size,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=heads // 4 if heads % 4 == 0 else 1,
            head_dim=head_dim,
            rms_norm_eps=target.rms_norm_eps,
            rope=target.rope,
            max_position_embeddings=target.max_position_embeddings,
            qk_norm=True,
        )
    return replace(
        target,
        num_hidden_layers=depth,
        qk_norm=True,
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=False,
    )


def deepseek_v4_dspark(
    target: DeepSeekV4Config, *, block_size: int = 5, stages: int = 3
) -> DeepSeekV4DSparkConfig:
    """The drafter inside DeepSeek-V4's checkpoints, in their proportions."""
    depth = target.num_hidden_layers
    return DeepSeekV4DSparkConfig(
        target=target,
        dspark_block_size=block_size,
        dspark_target_layer_ids=tuple(range(max(depth - 3, 0), depth)),
        dspark_noise_token_id=min(128799, target.vocab_size - 1),
        # 256 for width 4096, 512 for width 7168.
        dspark_markov_rank=1 << (target.hidden_size // 14).bit_length() - 1,
        n_mtp_layers=stages,
    )
