"""Compressed entries as an operand."""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Int

from pallas_kernels.ragged import Table


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Entries:
    """Compressed entries, and which of them each token sees: one way or the other.

    Attributes:
      table: the entries of every slot.
      limits_T: a token sees those below its limit.
      chosen_TX: or those named here, each once; -1 names none.
    """

    table: Table
    limits_T: Int[Array, " T"] | None = None
    chosen_TX: Int[Array, "T X"] | None = None
