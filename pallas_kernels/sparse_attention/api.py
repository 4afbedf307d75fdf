"""Attention over recent rows and some compressed entries, one softmax for both."""

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.sparse_attention.ref import sparse_attention_xla

IMPLEMENTATIONS = {"xla": Implementation(run=sparse_attention_xla)}


def sparse_attention(
    q_BQNH: Float[Array, "B Q N H"],
    recent_BRH: Float[Array, "B R H"],
    spans_BQ2: Int[Array, "B Q 2"],
    sinks_N: Float[Array, " N"],
    entries_LBCH: Float[Array, "L B C H"] | None = None,
    *,
    layer: int | Int[Array, ""] = 0,
    limits_BQ: Int[Array, "B Q"] | None = None,
    chosen_BQX: Int[Array, "B Q X"] | None = None,
    window: int,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "B Q N H"]:
    """Attention of N heads over keys that are values too (DeepSeek-V4, section 2.3).

    One softmax runs over a query's recent rows, its compressed entries, and a sink per
    head that takes weight and gives nothing.

    Args:
      q_BQNH: queries.
      recent_BRH: rows before and of this pass, oldest first.
      spans_BQ2: of them a query sees rows from .. to - 1. Where Q exceeds `window`, row
        q's span lies within s .. s + R - Q + `window`, s = `window` * (q // `window`).
      sinks_N: logit of each head's sink.
      entries_LBCH: compressed entries of many layers; None for layers without.
      layer: whose are meant.
      limits_BQ: a query sees entries below its limit.
      chosen_BQX: or it sees those named here, each once; -1 names none.
      window: W; queries go in blocks of as many.
      scale: of the scores.
      implementation: "xla", which None also means.

    Returns:
      Attention output in the type of the queries.

    Raises:
      ValueError: unknown implementation; entries with both or neither of `limits_BQ`
        and `chosen_BQX`.
    """
    if entries_LBCH is not None and (limits_BQ is None) == (chosen_BQX is None):
        raise ValueError("compressed entries need either limits_BQ or chosen_BQX")
    return call(
        "sparse_attention",
        IMPLEMENTATIONS,
        implementation,
        *(q_BQNH, recent_BRH, spans_BQ2, sinks_N),
        *(entries_LBCH, layer, limits_BQ, chosen_BQX),
        window=window,
        scale=scale,
    )
