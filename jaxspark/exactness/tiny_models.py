"""Random models small enough to know everything about: what exactness is audited on."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
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
    HybridDrafter,
    MTPDrafter,
    NgramDrafter,
    hybrid,
)
from jaxspark.drafters.heads import HEAD_TYPES
from jaxspark.models import DeepSeekV4, DeepSeekV4Config, DenseConfig, DenseDecoder

BLOCK_LENGTH = 2
Family = Literal["dense", "deepseek_v4"]
FAMILIES: tuple[Family, ...] = get_args(Family)
Maker = Callable[[Any, int, int], Drafter]


def tiny_models(
    family: Family,
    vocab_size: int,
    *,
    drafters: Iterable[str] | None = None,
    seed: int = 0,
    layers: int = 2,
    block_length: int = BLOCK_LENGTH,
    shards: int = 1,
) -> tuple[Any, dict[str, Drafter]]:
    """A random target whose distributions are far from uniform, and drafters for it.

    Args:
      family: "dense", or "deepseek_v4", whose layers are always two: CSA and HCA.
      vocab_size: V.
      drafters: names among `DRAFTERS[family]`; None builds all.
      seed: of the target; its drafters get the next one.
      layers: of a dense target.
      block_length: of the drafters.
      shards: devices of a mesh over which they can be shared out.

    Returns:
      The target, and the drafters by name.
    """
    dense = family == "dense"
    target = (
        tiny_dense(vocab_size, seed, layers, shards)
        if dense
        else tiny_v4(vocab_size, seed, shards)
    )
    makers = DRAFTERS[family]
    names = makers if drafters is None else drafters
    return target, {
        name: makers[name](target, seed + 1, block_length) for name in names
    }


def tiny_dense(
    vocab_size: int, seed: int = 0, layers: int = 2, shards: int = 1
) -> DenseDecoder:
    """A random decoder whose distributions are far from uniform."""
    config = DenseConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1 if shards == 1 else 2,
        head_dim=8,
    )
    return DenseDecoder(config, rngs=nnx.Rngs(seed))


def tiny_v4(vocab_size: int, seed: int = 0, shards: int = 1) -> DeepSeekV4:
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
        n_routed_experts=max(4, shards),
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


def _dspark(
    target: DenseDecoder,
    seed: int,
    block_length: int,
    *,
    head: str | None,
    pruned: bool = False,
) -> DSparkDrafter:
    vocab = target.config.vocab_size
    config = DSparkConfig(
        backbone=target.config,
        block_size=block_length,
        target_layer_ids=(-1, 0),
        mask_token_id=vocab - 1,
        num_target_layers=target.config.num_hidden_layers,
        markov_rank=4 if head else 0,
        markov_head_type=head or "vanilla",
        enable_confidence_head=head is not None,
        confidence_head_with_markov=head is not None,
        # An even number fewer than all, so that two shards can share them.
        draft_vocab_size=(vocab - 1) // 2 * 2 if pruned else None,
    )
    return DSparkDrafter(config, rngs=nnx.Rngs(seed))


def _eagle3(target: DenseDecoder, seed: int, block_length: int) -> Eagle3Drafter:
    layers = target.config.num_hidden_layers
    config = Eagle3Config(
        backbone=replace(target.config, num_hidden_layers=1, qk_norm=True),
        ttt_length=block_length,
        target_layer_ids=tuple(range(layers)),
        num_target_layers=layers,
    )
    return Eagle3Drafter(config, rngs=nnx.Rngs(seed))


def _v4_dspark(target: DeepSeekV4, seed: int, block_length: int) -> DeepSeekV4DSpark:
    config = DeepSeekV4DSparkConfig(
        target=target.config,
        dspark_block_size=block_length,
        dspark_target_layer_ids=(0, 1),
        dspark_noise_token_id=target.config.vocab_size - 1,
        dspark_markov_rank=4,
        n_mtp_layers=2,
    )
    return DeepSeekV4DSpark(config, rngs=nnx.Rngs(seed))


def _mtp(target: DeepSeekV4, seed: int, block_length: int) -> MTPDrafter:
    return MTPDrafter(target.config, block_length=block_length, rngs=nnx.Rngs(seed))


def _ngram(target, seed: int, block_length: int, *, longest: int = 4) -> NgramDrafter:
    return NgramDrafter(block_length=block_length, shortest=1, longest=longest)


def _hybrid(
    target, seed: int, block_length: int, *, model: Maker, longest: int = 4
) -> HybridDrafter:
    lookup = _ngram(target, seed, block_length, longest=longest)
    return hybrid(lookup, model(target, seed, block_length))


_pruned_dspark = partial(_dspark, head="gated", pruned=True)
# One of every kind, random weights; each is made of target, seed and block length.
DRAFTERS: dict[Family, dict[str, Maker]] = {
    "dense": {
        "ngram": _ngram,
        "dflash": partial(_dspark, head=None),
        **{f"dspark-{head}": partial(_dspark, head=head) for head in HEAD_TYPES},
        "dspark-pruned": partial(_dspark, head="vanilla", pruned=True),
        "eagle3": _eagle3,
        # A match of the prompt's length is followed, one of a single token is not.
        "hybrid-copies": partial(_hybrid, model=_pruned_dspark),
        "hybrid-asks": partial(_hybrid, model=_pruned_dspark, longest=1),
    },
    "deepseek_v4": {
        "ngram": partial(_ngram, longest=8),
        "deepseek_v4_dspark": _v4_dspark,
        "mtp": _mtp,
        "hybrid": partial(_hybrid, model=_v4_dspark, longest=8),
    },
}
