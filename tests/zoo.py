"""Tiny targets and one drafter of every kind, random weights."""

from dataclasses import replace

import jax
import numpy as np
from flax import nnx

from jaxspark.configs import drafters as draft_configs
from jaxspark.configs import targets as target_configs
from jaxspark.decoding import CostCurve, Costs
from jaxspark.drafters import DSparkDrafter, Eagle3Drafter, NgramDrafter, hybrid
from jaxspark.models import DenseDecoder

VOCAB = 61
BLOCK = 8
TARGETS = {
    "llama": replace(target_configs.tiny_llama(VOCAB), num_hidden_layers=2),
    "qwen3": replace(target_configs.tiny_qwen3(VOCAB), num_hidden_layers=2),
}
DRAFTERS = (
    "ngram",
    "dspark-vanilla",
    "dspark-gated",
    "dspark-rnn",
    "dspark-pruned",
    "dflash",
    "dflash-masks",
    "eagle3",
    "eagle3-pruned",
    "hybrid",
    "hybrid-pruned",
)
# Like them, a pruned Eagle3 of Llama's layers with all its norms, for fewer tests.
SPECULATORS = "eagle3-speculators"
# Those with parameters and a context of their own.
NEURAL = tuple(n for n in DRAFTERS if not n.startswith(("ngram", "hybrid")))


def target(name: str = "llama", seed: int = 0) -> DenseDecoder:
    """A tiny target with peaked distributions."""
    model = DenseDecoder(TARGETS[name], rngs=nnx.Rngs(seed))
    model.embed_tokens.weight[...] *= 30.0
    return model


def drafter(name: str, model: DenseDecoder, seed: int = 1):
    """A drafter for it by name."""
    options = {"depth": 1, "block_size": BLOCK, "mask_token_id": VOCAB - 1}
    kind, _, variant = name.partition("-")
    if kind == "ngram":
        return NgramDrafter(block_length=BLOCK, shortest=1)
    if kind == "hybrid":
        name = f"dspark-{variant or 'gated'}"
        lookup = NgramDrafter(block_length=BLOCK, shortest=1)
        return hybrid(lookup, drafter(name, model, seed))
    if kind == "eagle3":
        config = draft_configs.eagle3(
            model.config,
            block_size=BLOCK,
            draft_vocab_size=VOCAB // 2 if variant else None,
        )
        if variant == "speculators":
            # What speculators trains unless told otherwise.
            config = replace(
                config,
                backbone=replace(config.backbone, qk_norm=False),
                norm_before_fc=True,
                norm_before_residual=True,
                norm_output=True,
            )
        return _pruned(Eagle3Drafter(config, rngs=nnx.Rngs(seed)), model)
    if kind == "dflash":
        config = draft_configs.dflash(model.config, **options)
        config = replace(config, sample_from_anchor=variant != "masks")
    else:
        pruned = variant == "pruned"
        config = draft_configs.dspark(
            model.config,
            markov_rank=8,
            markov_head_type="vanilla" if pruned else variant,
            draft_vocab_size=VOCAB // 2 if pruned else None,
            **options,
        )
    return _pruned(DSparkDrafter(config, rngs=nnx.Rngs(seed)), model)


def _pruned(made, model):
    """Gives a pruned vocabulary every other token."""
    if made.draft_ids is not None:
        every_other = jax.numpy.arange(0, VOCAB - 1, 2)[: made.draft_ids.shape[0]]
        made.draft_ids[...] = every_other
        made.lm_head.weight[...] = model.head_VD[every_other]
    return made


def costs(sizes, seconds, *, plain: float, length: int) -> Costs:
    """Of rounds that draft so much, and of those without drafts."""
    least = sizes[0]
    return Costs(
        (CostCurve(0, (least,), (plain,)), CostCurve(length, sizes, tuple(seconds)))
    )


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of the given lengths."""
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCAB, length).tolist() for length in lengths]
