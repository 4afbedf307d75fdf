"""Compressed entries as an operand."""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Int

from pallas_kernels.indexer_topk.index import Index
from pallas_kernels.ragged import Table


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Entries:
    """Compressed entries, and which of them each token sees.

    All below a limit; of those, the best by an index; or the ones named one by one.

    Attributes:
      table: the entries of every slot.
      limits_T: a token sees those below its limit.
      index: and of those only the best.
      chosen_TX: or those named here, each once; -1 names none.
    """

    table: Table
    limits_T: Int[Array, " T"] | None = None
    index: Index | None = None
    chosen_TX: Int[Array, "T X"] | None = None

    @property
    def some(self) -> bool:
        """Whether tokens see some entries here and there."""
        return self.index is not None or self.chosen_TX is not None

    @property
    def picks(self) -> int:
        """How many a token sees at most, of those it sees here and there."""
        if self.index is not None:
            return min(self.index.picks, self.table.length)
        return 0 if self.chosen_TX is None else self.chosen_TX.shape[1]
