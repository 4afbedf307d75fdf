"""The state of many requests being decoded together, a pytree on the device.

A slot holds one request at a time, whose life is told by one word, its phase:

    EMPTY --admit--> PREFILLING --prefill--> DECODING --decode--> FINISHED --release-->

All transitions are pure functions of the state: see `lifecycle` for the first and the
last, `prefilling` for the second, `round` for the third.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxspark.decoding.adjustment_arrays import Adjustments
from jaxspark.decoding.adjustments import AdjustmentLimits
from jaxspark.decoding.estimator import Estimator, EstimatorState
from jaxspark.decoding.likeliest import Likeliest, LikeliestLimits
from jaxspark.decoding.sampling import Sampling
from jaxspark.decoding.schedule_state import ScheduleState
from jaxspark.drafters import Drafter
from jaxspark.models.base import TargetModel
from jaxspark.models.pages import in_pages, pages_for
from jaxspark.parallel.mesh import create, place, slot_shards, slots_per_shard
from jaxspark.parallel.rules import state_specs
from jaxspark.settings import standard_settings


class Phase(IntEnum):
    """Where a slot is in its life."""

    EMPTY = 0  # no request
    PREFILLING = 1  # prompt tokens before the anchor remain to be processed
    DECODING = 2  # takes part in rounds
    FINISHED = 3  # reached a stop token or its limit; its output can be read


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Counters:
    """What happened so far, per slot.

    Attributes:
      rounds_B: rounds the slot took part in.
      reached_BG: rounds in which draft j was verified and all before it accepted.
      accepted_BG: rounds in which draft j was accepted.
      drafted_B: rounds for which it was drafted.
      drafts_B: drafts in them.
      verified_B: drafts verified.
    """

    rounds_B: Int[Array, " B"]
    reached_BG: Int[Array, "B G"]
    accepted_BG: Int[Array, "B G"]
    drafted_B: Int[Array, " B"]
    drafts_B: Int[Array, " B"]
    verified_B: Int[Array, " B"]

    @classmethod
    def zeros(cls, slots: int, block_length: int) -> "Counters":
        """Nothing counted yet."""
        one, each = (slots,), (slots, block_length)
        return cls(
            *(jnp.zeros(shape, jnp.int32) for shape in (one, each, each, one, one, one))
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Everything `decode_round` reads and writes.

    The last committed token of a slot is its anchor, at position lengths_B - 1: chosen,
    not yet processed. Cache rows below processed_B are valid, which in a slot that
    decodes are those of all tokens before the anchor; other rows are garbage.

    Attributes:
      tokens_BS: prompt and output of each slot; garbage past its length.
      lengths_B: committed tokens.
      processed_B: tokens whose cache rows are written; 0 to lengths_B - 1.
      limits_B: length at which a slot finishes.
      phase_B: see `Phase`.
      stop_ids_BX: tokens that end a slot, padded with -1.
      sampling: per-slot sampling parameters.
      target_cache: the target's position-indexed caches.
      draft_cache: the drafter's.
      pages_BP: where the slots' cache rows lie, see `jaxspark.models.pages`; made by
        the host between calls. None for caches in which a slot's rows lie together.
      confidence_BG: confidence logits of the last round that drafted.
      certainty_BG: how decided its drafts were, see `Drawn`.
      schedule: what scheduling remembers.
      log_probs_BS: log-probabilities of output tokens; [B, 0] unless asked for.
      accepted_BS: whether output tokens are accepted drafts; [B, 0] unless asked for.
      counters: statistics.
      adjustments: what slots do to their logits; None is not compiled.
      likeliest: the most likely tokens beside those put out; None is not compiled.
      estimator: what was learned about acceptance; None is not compiled.
    """

    tokens_BS: Int[Array, "B S"]
    lengths_B: Int[Array, " B"]
    processed_B: Int[Array, " B"]
    limits_B: Int[Array, " B"]
    phase_B: Int[Array, " B"]
    stop_ids_BX: Int[Array, "B X"]
    sampling: Sampling
    target_cache: Any
    draft_cache: Any
    confidence_BG: Float[Array, "B G"]
    certainty_BG: Float[Array, "B G"]
    schedule: ScheduleState
    log_probs_BS: Float[Array, "B S"]
    accepted_BS: Bool[Array, "B S"]
    counters: Counters
    adjustments: Adjustments | None = None
    likeliest: Likeliest | None = None
    pages_BP: Int[Array, "B P"] | None = None
    estimator: EstimatorState | None = None

    @classmethod
    @standard_settings()
    def empty(
        cls,
        target: TargetModel,
        drafter: Drafter,
        *,
        slots: int,
        capacity: int,
        block_length: int,
        stop_ids: int = 1,
        log_probs: bool = False,
        accepted: bool = False,
        adjustments: AdjustmentLimits = AdjustmentLimits(),
        likeliest: LikeliestLimits = LikeliestLimits(),
        pages: int | None = None,
        estimator: Estimator | None = None,
        seconds: Sequence[float] | None = None,
    ) -> "DecodeState":
        """A state without requests; pure, so it may be made under a caller's `jit`.

        Args:
          target: for its caches.
          drafter: for its caches.
          slots: B.
          capacity: S, positions of each slot; a request needs those of its prompt, its
            output and one block.
          block_length: most drafts per round.
          stop_ids: most tokens that may end a request.
          log_probs: whether to keep log-probabilities of output tokens.
          accepted: whether to keep which output tokens are accepted drafts.
          adjustments: what requests may do to their logits.
          likeliest: what to keep of the most likely tokens.
          pages: pages that caches have, page 0 among them, which nobody owns; no slot
            has one yet. On a mesh every shard of slots has as many, with numbers of its
            own. None: every slot has rows of its own.
          estimator: that of the options it will be decoded with.
          seconds: of a round in each branch, which may be told otherwise later, see
            `ScheduleState`; None takes the schedule's own.

        Raises:
          ValueError: no slots, or such that shards cannot have equally many, or more
            drafts per round than the target's caches can forget.
        """
        if slots < 1:
            raise ValueError(f"a state needs at least 1 slot, got {slots}")
        slots_per_shard(slots)  # which must be even
        most = target.max_rewind
        if most is not None and block_length > most:
            raise ValueError(
                f"block length {block_length}: this target's caches can forget at most "
                f"{most} rejected drafts"
            )

        # An array of its own for every leaf: a state is donated.
        def counts_B():
            return jnp.zeros((slots,), jnp.int32)

        def logits_BG():
            return jnp.zeros((slots, block_length), jnp.float32)

        def cache_of(owner):
            if pages is None:
                return owner.init_cache(slots, capacity)
            # Under `jit`, so that the tables that pools replace are never made.
            every = pages * slot_shards()
            return jax.jit(lambda: in_pages(owner.init_cache(slots, capacity), every))()

        def make():
            return cls(
                tokens_BS=jnp.zeros((slots, capacity), jnp.int32),
                lengths_B=counts_B(),
                processed_B=counts_B(),
                limits_B=counts_B(),
                phase_B=counts_B(),  # Phase.EMPTY
                stop_ids_BX=jnp.full((slots, stop_ids), -1, jnp.int32),
                sampling=Sampling.of(slots),
                target_cache=cache_of(target),
                draft_cache=cache_of(drafter),
                confidence_BG=logits_BG(),
                certainty_BG=logits_BG(),
                schedule=ScheduleState.empty(slots, block_length, seconds),
                log_probs_BS=jnp.zeros(
                    (slots, capacity if log_probs else 0), jnp.float32
                ),
                accepted_BS=jnp.zeros((slots, capacity if accepted else 0), bool),
                counters=Counters.zeros(slots, block_length),
                adjustments=Adjustments.none(
                    slots, adjustments, target.config.vocab_size
                ),
                likeliest=Likeliest.empty(likeliest, slots=slots, capacity=capacity),
                pages_BP=None
                if pages is None
                else jnp.zeros((slots, pages_for(capacity)), jnp.int32),
                estimator=None
                if estimator is None
                else estimator.empty(slots, block_length),
            )

        return create(make, state_specs)

    @property
    def slots(self) -> int:
        """B."""
        return self.tokens_BS.shape[0]

    @property
    def capacity(self) -> int:
        """S."""
        return self.tokens_BS.shape[1]

    @property
    def block_length(self) -> int:
        """G, the most drafts per round."""
        return self.confidence_BG.shape[1]

    @property
    def keeps_log_probs(self) -> bool:
        """Whether log-probabilities of output tokens are kept."""
        return self.log_probs_BS.shape[1] > 0

    @property
    def live_B(self) -> Bool[Array, " B"]:
        """Slots that take part in rounds."""
        return self.phase_B == Phase.DECODING

    @property
    def finished_B(self) -> Bool[Array, " B"]:
        """Slots whose output is complete."""
        return self.phase_B == Phase.FINISHED

    def with_pages(self, pages_BP: np.ndarray) -> "DecodeState":
        """With another page table, of the host's."""
        table = {"pages_BP": np.array(pages_BP, np.int32)}
        [pages] = place(table, state_specs).values()
        return replace(self, pages_BP=jnp.asarray(pages))

    def rewind(self, lengths_B: Int[Array, " B"]) -> "DecodeState":
        """Back to earlier lengths, from which slots decode anew.

        Only for lengths that the caches still hold, see `TargetModel.max_rewind`.
        """
        decoding = jnp.full_like(self.phase_B, Phase.DECODING)
        return replace(
            self,
            lengths_B=lengths_B,
            processed_B=lengths_B - 1,
            phase_B=jnp.where(self.phase_B == Phase.EMPTY, self.phase_B, decoding),
        )
