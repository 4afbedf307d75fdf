"""Attention over recent rows and some compressed entries, one softmax for both."""

import functools
from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.ragged import Ragged
from pallas_kernels.rings import Lookback, in_order
from pallas_kernels.rotary import Rotary
from pallas_kernels.sparse_attention import mosaic_gpu, mosaic_tpu
from pallas_kernels.sparse_attention.entries import Entries
from pallas_kernels.sparse_attention.ref import sparse_attention_xla


def _in_order(run: Callable) -> Callable:
    """Of an implementation that knows no rings: XLA copies rows out of them."""

    @functools.wraps(run)
    def attend(q_TNH, keys_TH, before, sinks_N, ragged, *others, **static):
        before_BWH = in_order(before, ragged)
        return run(q_TNH, keys_TH, before_BWH, sinks_N, ragged, *others, **static)

    return attend


IMPLEMENTATIONS = {
    "xla": Implementation(run=_in_order(sparse_attention_xla)),
    "mosaic_tpu": Implementation(
        run=mosaic_tpu.sparse_attention_mosaic_tpu,
        platforms=("tpu",),
        supports=mosaic_tpu.supports,
    ),
    "mosaic_gpu": Implementation(
        run=mosaic_gpu.sparse_attention_mosaic_gpu,
        platforms=("cuda",),
        supports=mosaic_gpu.supports,
    ),
}


def sparse_attention(
    q_TNH: Float[Array, "T N H"],
    keys_TH: Float[Array, "T H"],
    before: Float[Array, "B W H"] | Lookback,
    sinks_N: Float[Array, " N"],
    ragged: Ragged,
    entries: Entries | None = None,
    *,
    scale: float,
    causal: bool = True,
    rotary: Rotary | None = None,
    query_norm: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "T N H"]:
    """Attention of N heads over keys that are values too (DeepSeek-V4, section 2.3).

    One softmax runs over a query's recent rows, its compressed entries, and a sink per
    head that takes weight and gives nothing.

    Args:
      q_TNH: queries.
      keys_TH: keys of the same tokens.
      before: keys of the W positions before each slot's first token, oldest first, or
        the ring in which they lie; those of positions below 0 are not seen.
      sinks_N: logit of each head's sink.
      ragged: the tokens' slots.
      entries: compressed entries, and which of them each token sees.
      scale: of the scores.
      causal: a token sees itself and the W rows before it; otherwise, as in a draft
        block, all rows of its slot and the W before them.
      rotary: turns queries to their positions, and outputs back from them, as values
        that are keys carry their own; angles have no gradients.
      query_norm: epsilon of an RMS norm, without weights, of each head's query before
        it turns; None: no norm.
      implementation: "xla", or a kernel for heads that are multiples of 128 wide:
        "mosaic_tpu", or "mosaic_gpu" for 64 or 128 of them in bfloat16; None takes
        those in programs for TPUs and Hopper GPUs where they can.

    Returns:
      Attention output in the type of the queries; padding's is anything.

    Raises:
      ValueError: an implementation that is unknown or does not support the operands;
        entries with both or neither of `limits_T` and `chosen_TX`, or with an index but
        no limits.
    """
    if entries is not None:
        if (entries.limits_T is None) == (entries.chosen_TX is None):
            raise ValueError("compressed entries need either limits_T or chosen_TX")
        if entries.index is not None and entries.limits_T is None:
            raise ValueError("an index chooses below limits, and there is no limits_T")
    rotary = jax.lax.stop_gradient(rotary)
    return call(
        "sparse_attention",
        IMPLEMENTATIONS,
        implementation,
        *(q_TNH, keys_TH, before, sinks_N, ragged, entries, rotary),
        scale=scale,
        causal=causal,
        query_norm=query_norm,
    )
