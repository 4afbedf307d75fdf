"""No drafts: the same decode loop then is plain one-token-at-a-time decoding."""

from dataclasses import dataclass
from typing import ClassVar

import jax

from jaxspark.drafters.base import Proposal


@jax.tree_util.register_static
@dataclass(frozen=True)
class PlainDrafter:
    """Proposes nothing."""

    block_length: ClassVar[int] = 0
    taps: ClassVar[tuple[int, ...]] = ()
    abstains: ClassVar[bool] = False

    def check_target(self, target):
        """Any target will do."""

    def init_cache(self, slots, length):
        """Nothing to remember."""
        return ()

    def observe(self, cache, taps_mDT, tokens):
        """Nothing to remember."""
        return cache

    def propose(self, target, cache, context, sampler, block_length):
        """An empty block."""
        return Proposal.empty(len(context.lengths_B)), cache
