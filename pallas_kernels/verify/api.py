"""What verification needs to know of the target's logits, without writing them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.draws import Draws, Rows
from pallas_kernels.verify import mosaic_tpu
from pallas_kernels.verify.ref import verify_xla

IMPLEMENTATIONS = {
    "xla": Implementation(run=verify_xla),
    "mosaic_tpu": Implementation(
        run=mosaic_tpu.verify_mosaic_tpu,
        platforms=("tpu",),
        supports=mosaic_tpu.supports,
    ),
}


def verify(
    hidden_TD: Float[Array, "T D"],
    head_VD: Float[Array, "V D"],
    rows: Rows,
    *,
    named_T: Int[Array, " T"] | None = None,
    first: int | Int[Array, ""] = 0,
    implementation: str | None = None,
) -> Draws:
    """The target's own draw behind every row, with log-normalisers.

    Under the gumbel coupling a draft is accepted where it is that draw; under rejection
    sampling with min(1, p/q), for which the draft is named and `Draws.log_prob` has its
    logit and the normaliser.

    Args:
      hidden_TD: normed hidden states.
      head_VD: the LM head, or the part of it that is here.
      rows: temperatures and keys.
      named_T: a token of each row whose logit is told; None for none.
      first: id of the part's first token; noise and names go by ids, places do not.
      implementation: "xla", or "mosaic_tpu", a kernel for widths in multiples of 128;
        None takes that in programs for TPUs where it can.

    Raises:
      ValueError: an implementation that is unknown or does not support the operands.
    """
    operands = (hidden_TD, head_VD, rows, named_T, jnp.asarray(first, jnp.int32))
    with jax.named_scope("verify"):
        return call("verify", IMPLEMENTATIONS, implementation, *operands)
