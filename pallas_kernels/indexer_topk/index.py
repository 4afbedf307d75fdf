"""What the Lightning Indexer chooses by, as an operand."""

from dataclasses import dataclass, field

import jax
from jaxtyping import Array, Float

from pallas_kernels.ragged import Table


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Index:
    """Scores entries by sum_n w_n ReLU(q_n . k_c), see `index_scores`.

    Attributes:
      q_TNH: index queries.
      weights_TN: of their heads, scales included, float32.
      keys: an index key per entry.
      picks: how many entries a query chooses (static).
    """

    q_TNH: Float[Array, "T N H"]
    weights_TN: Float[Array, "T N"]
    keys: Table
    picks: int = field(metadata={"static": True})
