"""Random models small enough to know everything about: what exactness is audited on."""

from dataclasses import replace
from typing import Any, Literal, get_args

from flax import nnx

from jaxspark.drafters import (
    DeepSeekV4DSpark,
    DeepSeekV4DSparkConfig,
    Drafter,
    DSparkConfig,
    DSparkDrafter,
    Eagle3Config,
    Eagle3Drafter,
    MTPDrafter,
    NgramDrafter,
    hybrid,
)
from jaxspark.drafters.heads import HEAD_TYPES
from jaxspark.models import DeepSeekV4, DeepSeekV4Config, DenseConfig, DenseDecoder

BLOCK_LENGTH = 2
Family = Literal["dense", "deepseek_v4"]
FAMILIES: tuple[Family, ...] = get_args(Family)


def tiny_models(
    family: Family,
    vocab_size: int,
    *,
    seed: int = 0,
    layers: int = 2,
    block_length: int = BLOCK_LENGTH,
) -> tuple[Any, dict[str, Drafter]]:
    """A random target whose distributions are far from uniform, and drafters for it.

    Args:
      family: "dense", or "deepseek_v4", whose layers are always two: CSA and HCA.
      vocab_size: V.
      seed: of the target; its drafters get the next one.
      layers: of a dense target.
      block_length: of the drafters.

    Returns:
      The target, and one drafter of every kind by name.
    """
    if family == "deepseek_v4":
        sparse = tiny_v4(vocab_size, seed)
        return sparse, v4_drafters(sparse, seed + 1, block_length)
    dense = tiny_dense(vocab_size, seed, layers)
    return dense, dense_drafters(dense, seed + 1, block_length)


def tiny_dense(vocab_size: int, seed: int = 0, layers: int = 2) -> DenseDecoder:
    """A random decoder whose distributions are far from uniform."""
    config = DenseConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return DenseDecoder(config, rngs=nnx.Rngs(seed))


def dense_drafters(
    target: DenseDecoder, seed: int = 1, block_length: int = BLOCK_LENGTH
) -> dict[str, Drafter]:
    """One drafter of every kind for a tiny target, random weights."""
    vocab, layers = target.config.vocab_size, target.config.num_hidden_layers

    def dspark(head: str | None, draft_vocab_size: int | None = None):
        config = DSparkConfig(
            backbone=target.config,
            block_size=block_length,
            target_layer_ids=(-1, 0),
            mask_token_id=vocab - 1,
            num_target_layers=layers,
            markov_rank=4 if head else 0,
            markov_head_type=head or "vanilla",
            enable_confidence_head=head is not None,
            confidence_head_with_markov=head is not None,
            draft_vocab_size=draft_vocab_size,
        )
        return DSparkDrafter(config, rngs=nnx.Rngs(seed))

    def lookup(longest: int) -> NgramDrafter:
        return NgramDrafter(block_length=block_length, shortest=1, longest=longest)

    return {
        "ngram": lookup(4),
        "dflash": dspark(None),
        **{f"dspark-{head}": dspark(head) for head in HEAD_TYPES},
        "dspark-pruned": dspark("vanilla", vocab - 1),
        "eagle3": Eagle3Drafter(
            Eagle3Config(
                backbone=replace(target.config, num_hidden_layers=1, qk_norm=True),
                ttt_length=block_length,
                target_layer_ids=tuple(range(layers)),
                num_target_layers=layers,
            ),
            rngs=nnx.Rngs(seed),
        ),
        # A match of the prompt's length is followed, one of a single token is not.
        "hybrid-copies": hybrid(lookup(4), dspark("gated", vocab - 1)),
        "hybrid-asks": hybrid(lookup(1), dspark("gated", vocab - 1)),
    }


def tiny_v4(vocab_size: int, seed: int = 0) -> DeepSeekV4:
    """A DeepSeek-V4 of two layers; prompts of 8 tokens reach all of both."""
    config = DeepSeekV4Config(
        vocab_size=vocab_size,
        hidden_size=16,
        moe_intermediate_size=8,
        num_attention_heads=2,
        head_dim=8,
        qk_rope_head_dim=4,
        q_lora_rank=8,
        o_groups=2,
        o_lora_rank=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        compress_ratios=(4, 8),
        num_hash_layers=1,
        index_n_heads=16,
        index_head_dim=4,
        index_topk=2,
        sliding_window=4,
        hca_ratio=8,
        hc_mult=2,
        hc_sinkhorn_iters=3,
    )
    target = DeepSeekV4(config, rngs=nnx.Rngs(seed))
    target.embed_tokens.weight[...] *= 30.0
    return target


def v4_drafters(
    target: DeepSeekV4, seed: int = 1, block_length: int = BLOCK_LENGTH
) -> dict[str, Drafter]:
    """One drafter of every kind for it, random weights."""
    config = DeepSeekV4DSparkConfig(
        target=target.config,
        dspark_block_size=block_length,
        dspark_target_layer_ids=(0, 1),
        dspark_noise_token_id=target.config.vocab_size - 1,
        dspark_markov_rank=4,
        n_mtp_layers=2,
    )
    dspark = DeepSeekV4DSpark(config, rngs=nnx.Rngs(seed))
    mtp = MTPDrafter(target.config, block_length=block_length, rngs=nnx.Rngs(seed))
    lookup = NgramDrafter(block_length=block_length, shortest=1)
    return {
        "ngram": lookup,
        "deepseek_v4_dspark": dspark,
        "mtp": mtp,
        "hybrid": hybrid(lookup, dspark),
    }
