"""Compression of m positions into one cached entry."""

from jaxtyping import Array, Float

from pallas_kernels.compress import mosaic_gpu, mosaic_tpu
from pallas_kernels.compress.ref import compress_xla
from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.ragged import Ragged, Table

IMPLEMENTATIONS = {
    "xla": Implementation(run=compress_xla),
    "mosaic_tpu": Implementation(
        run=mosaic_tpu.compress_mosaic_tpu,
        platforms=("tpu",),
        supports=mosaic_tpu.supports,
    ),
    "mosaic_gpu": Implementation(
        run=mosaic_gpu.compress_mosaic_gpu,
        platforms=("cuda",),
        supports=mosaic_gpu.supports,
    ),
}


def compress(
    rows_TX: Float[Array, "T X"],
    pending: Table,
    entries: Table,
    weight_H: Float[Array, " H"],
    frequencies_h: Float[Array, " h"],
    ragged: Ragged,
    *,
    ratio: int,
    eps: float,
    amplitude: float = 1.0,
    implementation: str | None = None,
) -> tuple[Float[Array, "L B S X"], Float[Array, "L B C *H"]]:
    """Remembers a pass's rows and writes the entries whose windows end in it.

    Entry i is, per channel, over the m positions p of window i (DeepSeek-V4, sections
    2.3.1 and 2.3.2),

        c_i = rope_{i m}(norm(sum_p softmax_p(z_p) * v_p))

    With rows of two series the sum runs over the first of window i - 1 and the second
    of window i, 2 m rows in one softmax.

    Args:
      rows_TX: v of each series, then z of each; X is 2 H or 4 H, in float32.
      pending: the ring of rows that await their window's end; position p lies at place
        p mod S. It must be longer than the series' windows.
      entries: the table of entries; with pages, those with p <= 0 are not written.
      weight_H: of the root-mean-square norm.
      frequencies_h: in radians per position, of the last 2h channels, which turn in
        pairs of neighbours.
      ragged: the tokens' slots.
      ratio: m.
      eps: of the norm.
      amplitude: factor on cos and sin.
      implementation: "xla", or "mosaic_tpu" or "mosaic_gpu", kernels for the few tokens
        of decoding and entries that are a multiple of 128 wide, which read only windows
        that end; None takes those in programs for TPUs and Hopper GPUs where they can.

    Returns:
      The rows of `pending`, and those of `entries`.

    Raises:
      ValueError: an implementation that is unknown or does not support the operands.
    """
    return call(
        "compress",
        IMPLEMENTATIONS,
        implementation,
        *(rows_TX, pending, entries, weight_H, frequencies_h, ragged),
        ratio=ratio,
        eps=eps,
        amplitude=amplitude,
    )
