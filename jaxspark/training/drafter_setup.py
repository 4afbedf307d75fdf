"""Drafters before their first step: architecture, size and initialization."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flax import nnx

from jaxspark.checkpoints import draft_format, load_draft_checkpoint
from jaxspark.configs import drafters as draft_configs
from jaxspark.configuration import Configuration, option
from jaxspark.drafters import DSparkDrafter, Eagle3Drafter
from jaxspark.drafters.heads import HEAD_TYPES
from jaxspark.models import DenseDecoder, TargetDecoder
from jaxspark.training import initialize, least_squares, objective
from jaxspark.training.data.packing import Batches, Packed, draft_vocabulary
from jaxspark.training.features import FeatureSource

OBJECTIVES = {
    "dspark": objective.DSPARK,
    "dflash": objective.DFLASH,
    "eagle3": objective.EAGLE3,
}


@dataclass(frozen=True, kw_only=True)
class DrafterOptions(Configuration):
    """Which drafter is trained, and how it starts."""

    drafter: str = option("Kind of drafter.", "dspark", choices=tuple(OBJECTIVES))
    head: str = option("Sequential head of dspark.", "vanilla", choices=HEAD_TYPES)
    depth: int = option("Draft layers (eagle3 has one).", 2, at_least=1)
    block_length: int = option("Tokens per block.", 7, at_least=1)
    rank: int = option("Rank of the sequential head.", 64, at_least=1)
    taps: tuple[int, ...] | None = option(
        "Target layers to see; five spread evenly if not set.", None
    )
    draft_vocab: int | None = option(
        "Size of a pruned draft vocabulary.", None, at_least=1
    )
    mask_token: int = option("Token that fills a block behind its anchor.", 0)
    init: str | None = option(
        "How it starts: fitted map by map (if not set, but for eagle3), draft layers "
        "that are a dense target's last, or at random.",
        None,
        choices=("least_squares", "target", "random"),
    )
    fit_sequences: int = option("Sequences that least squares see.", 480, at_least=1)
    warm_start: str | None = option("A drafter's folder to start from instead.", None)

    def __post_init__(self):
        super().__post_init__()
        if self.init == "least_squares" and not self._may_be_fitted:
            raise ValueError(
                "--init=least_squares is for dspark and dflash without --warm_start"
            )

    @property
    def _may_be_fitted(self) -> bool:
        return self.drafter != "eagle3" and not self.warm_start

    @property
    def start(self) -> str:
        """How it starts; a warm start then replaces what it has."""
        return self.init or ("least_squares" if self._may_be_fitted else "target")


def new_drafter(
    options: DrafterOptions, target: TargetDecoder, packed: Packed, *, seed: int
) -> tuple[DSparkDrafter | Eagle3Drafter, list[str]]:
    """A drafter before its first step; least squares is left to `fit`.

    Args:
      options: which one.
      target: the model it drafts for.
      packed: training data, whose most frequent tokens a pruned vocabulary has.
      seed: of what starts at random.

    Returns:
      The drafter, and the parameters that a warm start did not have.

    Raises:
      ValueError: there is no such drafter for the target, or none to start from.
    """
    sizes: dict[str, Any] = {
        "block_size": options.block_length,
        "draft_vocab_size": options.draft_vocab,
    }
    if options.drafter == "eagle3":
        config: Any = draft_configs.eagle3(target.config, **sizes)
    else:
        sizes |= {"depth": options.depth, "mask_token_id": options.mask_token}
        if options.drafter == "dspark":
            sizes |= {"markov_rank": options.rank, "markov_head_type": options.head}
        config = getattr(draft_configs, options.drafter)(target.config, **sizes)
    if options.taps:
        config = replace(config, target_layer_ids=options.taps)
    draft_format(config)  # What cannot be written shall not be trained.
    kind = Eagle3Drafter if options.drafter == "eagle3" else DSparkDrafter
    drafter = kind(config, rngs=nnx.Rngs(seed))
    ids = None
    if options.draft_vocab:
        vocab = target.config.vocab_size
        ids = draft_vocabulary(packed, vocab, options.draft_vocab)
    other: Any = None
    if options.warm_start:
        other = load_draft_checkpoint(options.warm_start, target)
        if ids is not None and other.config.draft_vocab_size == len(ids):
            ids = np.asarray(other.draft_ids[...])
    initialize.use_vocabulary(drafter, target, ids)
    if options.start == "target" and isinstance(target, DenseDecoder):
        initialize.from_target(drafter, target)
    elif options.init == "target":
        raise ValueError(
            "--init=target: draft layers are copies of a dense target's; this one is "
            f"a {type(target).__name__}, use least_squares or random"
        )
    left = [] if other is None else initialize.from_drafter(drafter, other)
    return drafter, left


def fit(
    options: DrafterOptions,
    drafter: DSparkDrafter | Eagle3Drafter,
    target: TargetDecoder,
    batches: Batches,
    source: FeatureSource,
    *,
    anchors: int,
    seed: int,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> None:
    """Starts a drafter by least squares on the first batches, in place.

    Args:
      options: how many sequences it sees.
      drafter: of `new_drafter`.
      target: the model it drafts for.
      batches: training data.
      source: features of any batch.
      anchors: blocks per sequence.
      seed: of the anchors.
      on_stage: called with the name of what is fitted next.
    """
    assert isinstance(drafter, DSparkDrafter)
    count = min(options.fit_sequences / batches.size, batches.per_epoch)
    samples = [batches[index] for index in range(max(1, int(count)))]
    least_squares.fit(
        drafter,
        target,
        samples,
        source,
        block_length=options.block_length,
        anchors=anchors,
        seed=seed,
        on_stage=on_stage,
    )
