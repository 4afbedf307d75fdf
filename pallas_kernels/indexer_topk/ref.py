"""The XLA reference, and the specification, of `indexer_topk`."""

import jax
from jaxtyping import Array, Int

from pallas_kernels.index_scores.api import index_scores
from pallas_kernels.indexer_topk.index import Index
from pallas_kernels.indexer_topk.union import Union, union
from pallas_kernels.ragged import Ragged
from pallas_kernels.top_k.api import top_k


def choices(
    index: Index, limits_T: Int[Array, " T"], ragged: Ragged
) -> Int[Array, "T X"]:
    """What each query chooses, see `top_k`; no gradient flows through it."""
    scores_TC = index_scores(index.q_TNH, index.keys, index.weights_TN, ragged)
    return top_k(jax.lax.stop_gradient(scores_TC), limits_T, k=index.picks)


def indexer_topk_xla(index: Index, limits_T: Int[Array, " T"], ragged: Ragged) -> Union:
    """See `api.indexer_topk`."""
    return union(ragged.grouped(choices(index, limits_T, ragged), -1))
