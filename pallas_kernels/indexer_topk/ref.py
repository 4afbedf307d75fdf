"""The XLA reference, and the specification, of `indexer_topk`."""

import jax
from jaxtyping import Array, Int

from pallas_kernels.index_scores.api import scores_and_best
from pallas_kernels.indexer_topk.index import Index
from pallas_kernels.indexer_topk.union import Union, union
from pallas_kernels.ragged import Ragged
from pallas_kernels.sparse_attention.entries import Entries
from pallas_kernels.top_k.api import top_k


def choices(
    index: Index, limits_T: Int[Array, " T"], ragged: Ragged
) -> Int[Array, "T X"]:
    """What each query chooses, see `top_k`; no gradient flows through it."""
    operands = (index.q_TNH, index.keys, index.weights_TN, ragged, limits_T)
    scored = jax.lax.stop_gradient(scores_and_best(*operands))
    return top_k(scored[0], limits_T, scored[1], k=index.picks)


def choices_of(entries: Entries, ragged: Ragged) -> Int[Array, "T X"]:
    """What tokens see here and there, by name."""
    if entries.index is None:
        assert entries.chosen_TX is not None
        return entries.chosen_TX
    assert entries.limits_T is not None
    return choices(entries.index, entries.limits_T, ragged)


def indexer_topk_xla(index: Index, limits_T: Int[Array, " T"], ragged: Ragged) -> Union:
    """See `api.indexer_topk`."""
    return union(ragged.grouped(choices(index, limits_T, ragged), -1))
