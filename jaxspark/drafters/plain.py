"""No drafts: the same decode loop then is plain one-token-at-a-time decoding."""

from dataclasses import dataclass
from typing import ClassVar

import jax

from jaxspark.drafters.base import Proposal, WithoutContext


@jax.tree_util.register_static
@dataclass(frozen=True)
class PlainDrafter(WithoutContext):
    """Proposes nothing."""

    block_length: ClassVar[int] = 0
    may_skip: ClassVar[bool] = False

    def propose(self, target, cache, context, sampler, block_length):
        """An empty block."""
        return Proposal.empty(len(context.lengths_B)), cache
