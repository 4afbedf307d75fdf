"""What enumerated requests do to their logits, and what that is by definition."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt

from jaxspark.decoding import Adjustment, AdjustmentLimits
from jaxspark.decoding.adjustment_arrays import Adjustments
from jaxspark.exactness.by_definition import (
    adjusted_by_definition,
    masked_by_definition,
)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What enumerated requests do to their logits; by default nothing.

    Attributes:
      adjustment: of all slots.
      output: committed tokens that are output, the newest; the prompt is before them.
      stop_ids: of the requests, for least lengths; nothing ends there.
      limits: what is compiled; one value for many lets them share programs.
      grammar: tells which tokens may come behind an output; None masks nothing.
    """

    adjustment: Adjustment = Adjustment()
    output: int = 0
    stop_ids: tuple[int, ...] = ()
    limits: AdjustmentLimits = AdjustmentLimits()
    grammar: Callable[[Sequence[int]], Collection[int]] | None = None

    def adjusted(self, logits_V: np.ndarray, tokens: Sequence[int], prompt: int):
        """Logits after `tokens`, the first `prompt` of which are no output."""
        output = tokens[prompt:]
        z_V = adjusted_by_definition(
            logits_V, tokens[:prompt], output, self.adjustment, self.stop_ids
        )
        if self.grammar is None:
            return z_V
        return masked_by_definition(z_V, logits_V, self.grammar(output))

    def masks_along(
        self, tokens: Sequence[int], drafts: Sequence[int]
    ) -> UInt[np.ndarray, "1 Q U"]:
        """Bits of the tokens that may come behind `tokens` and each of the drafts."""
        assert self.grammar is not None
        text = [*tokens[len(tokens) - self.output :], *drafts]
        ends = range(len(text) - len(drafts), len(text) + 1)
        rows = [sum(1 << each for each in self.grammar(text[:end])) for end in ends]
        return np.array(rows, np.uint32)[None, :, None]

    def of(self, tokens: Sequence[int], vocab: int) -> Adjustments | None:
        """For one slot with these committed tokens."""
        if not self.limits.anything:
            return None
        return Adjustments.of(
            [self.adjustment],
            self.limits,
            vocab=vocab,
            prompt_lengths=[len(tokens) - self.output],
        )
