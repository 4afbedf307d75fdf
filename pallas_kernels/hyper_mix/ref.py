"""The XLA reference, and the specification, of `hyper_mix`."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.hyper_connections.ref import unstacked, weighted


def hyper_mix_xla(
    y_TD: Float[Array, "T D"],
    x_TMD: Float[Array, "T M D"],
    post_TM: Float[Array, "T M"],
    comb_TMM: Float[Array, "T M M"],
) -> Float[Array, "T M D"]:
    """See `api.hyper_mix`; streams one by one, as in `hyper_connections`."""
    streams = unstacked(x_TMD)
    mixed = [
        post_TM[:, k, None] * y_TD + weighted(comb_TMM[:, :, k], streams)
        for k in range(len(streams))
    ]
    return jnp.stack(mixed, axis=1).astype(x_TMD.dtype)
