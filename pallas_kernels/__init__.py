"""Kernels behind one door: each op is a function with an `implementation` argument.

"xla" always exists and is the specification. Ops live in `<op>/{api,ref}.py`; they take
flat tokens and caches as they lie (`ragged`).
"""

from pallas_kernels.cached_attention.api import cached_attention
from pallas_kernels.compress.api import compress
from pallas_kernels.draft_sampling.api import draft_sampling
from pallas_kernels.draws import Draws, Rows
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.hyper_connections.api import hyper_connections
from pallas_kernels.hyper_mix.api import hyper_mix
from pallas_kernels.index_scores.api import index_scores
from pallas_kernels.indexer_topk.api import indexer_topk
from pallas_kernels.indexer_topk.index import Index
from pallas_kernels.ragged import Ragged, Table
from pallas_kernels.rotary import Rotary
from pallas_kernels.sparse_attention.api import sparse_attention
from pallas_kernels.sparse_attention.entries import Entries
from pallas_kernels.top_k.api import top_k
from pallas_kernels.verify.api import verify

__all__ = [
    "Draws",
    "Entries",
    "Index",
    "Ragged",
    "Rotary",
    "Rows",
    "Table",
    "cached_attention",
    "compress",
    "draft_sampling",
    "grouped_matmul",
    "hyper_connections",
    "hyper_mix",
    "index_scores",
    "indexer_topk",
    "sparse_attention",
    "top_k",
    "verify",
]
