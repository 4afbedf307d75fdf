"""The Lightning Indexer's choice (DeepSeek-V4 report, section 2.3.1)."""

from jaxtyping import Array, Int

from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.indexer_topk import mosaic_tpu
from pallas_kernels.indexer_topk.index import Index
from pallas_kernels.indexer_topk.ref import indexer_topk_xla
from pallas_kernels.indexer_topk.union import Union
from pallas_kernels.ragged import Ragged

IMPLEMENTATIONS = {
    "xla": Implementation(run=indexer_topk_xla),
    "mosaic_tpu": Implementation(
        run=mosaic_tpu.indexer_topk_mosaic_tpu,
        platforms=("tpu",),
        supports=mosaic_tpu.supports,
    ),
}


def indexer_topk(
    index: Index,
    limits_T: Int[Array, " T"],
    ragged: Ragged,
    *,
    implementation: str | None = None,
) -> Union:
    """The best entries of each query, united over groups of a slot's queries.

    Each query chooses the `index.picks` best-scored entries below its limit, or all of
    them where they are fewer; of equal scores those of the lowest entries.

    Args:
      index: queries, keys, and how many are chosen.
      limits_T: entries that each token may choose, from the first on.
      ragged: the tokens' slots; each has G / B groups, see `Ragged.grouped`.
      implementation: "xla", or "mosaic_tpu", a kernel that writes no scores; None takes
        that in programs for TPUs where it can.

    Raises:
      ValueError: an implementation that is unknown or does not support the operands.
    """
    operands = (index, limits_T, ragged)
    return call("indexer_topk", IMPLEMENTATIONS, implementation, *operands)
