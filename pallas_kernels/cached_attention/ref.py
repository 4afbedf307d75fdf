"""The XLA reference, and the specification, of `cached_attention`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.precision import precision


def cached_attention_xla(
    q_BKMH: Float[Array, "B K M H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    limits_BM: Int[Array, "B M"],
    scale: float,
) -> Float[Array, "B K M H"]:
    """softmax(scale q k^T over positions < limit) v, scores and softmax in float32."""
    exact = precision(q_BKMH.dtype)
    scores_BKMS = scale * jnp.einsum(
        "BKMH,BKSH->BKMS",
        q_BKMH,
        k_BKSH,
        precision=exact,
        preferred_element_type=jnp.float32,
    )
    positions_S = jnp.arange(k_BKSH.shape[2])
    seen_BMS = positions_S < limits_BM[..., None]
    # A finite floor keeps rows without any visible position free of NaN.
    floor = jnp.finfo(jnp.float32).min
    scores_BKMS = jnp.where(seen_BMS[:, None], scores_BKMS, floor)
    weights_BKMS = jax.nn.softmax(scores_BKMS, axis=-1).astype(v_BKSH.dtype)
    return jnp.einsum("BKMS,BKSH->BKMH", weights_BKMS, v_BKSH, precision=exact)
