"""The XLA reference, and the specification, of `cached_attention`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.precision import precision
from pallas_kernels.ragged import Ragged


def cached_attention_xla(
    q_TNH: Float[Array, "T N H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    ragged: Ragged,
    limits_T: Int[Array, " T"],
    pages_BP: Int[Array, "B P"] | None,
    scale: float,
) -> Float[Array, "T N H"]:
    """softmax(scale q k^T over positions < limit) v, scores and softmax in float32."""
    if pages_BP is not None:
        k_BKSH, v_BKSH = (_in_order(x, pages_BP) for x in (k_BKSH, v_BKSH))
    B, K, S, H = k_BKSH.shape
    groups = q_TNH.shape[1] // K
    q_BQKgH = ragged.padded(q_TNH, 0).reshape(B, -1, K, groups, H)
    Q = q_BQKgH.shape[1]
    q_BKMH = jnp.moveaxis(q_BQKgH, 2, 1).reshape(B, K, Q * groups, H)
    exact = precision(q_TNH.dtype)
    scores_BKMS = scale * jnp.einsum(
        "BKMH,BKSH->BKMS",
        q_BKMH,
        k_BKSH,
        precision=exact,
        preferred_element_type=jnp.float32,
    )
    limits_BM = jnp.repeat(ragged.padded(limits_T, 1), groups, axis=1)
    seen_BMS = jnp.arange(S) < limits_BM[..., None]
    # A finite floor keeps rows without any visible position free of NaN.
    floor = jnp.finfo(jnp.float32).min
    scores_BKMS = jnp.where(seen_BMS[:, None], scores_BKMS, floor)
    weights_BKMS = jax.nn.softmax(scores_BKMS, axis=-1).astype(v_BKSH.dtype)
    o_BKMH = jnp.einsum("BKMS,BKSH->BKMH", weights_BKMS, v_BKSH, precision=exact)
    o_BQKgH = jnp.moveaxis(o_BKMH.reshape(B, K, Q, groups, H), 1, 2)
    return ragged.flat(o_BQKgH.reshape(B, Q, K * groups, H))


def _in_order(x_PKSH, pages_BP):
    """The rows of every slot, out of its pages."""
    x_BKPSH = jnp.moveaxis(x_PKSH[pages_BP], 2, 1)
    return x_BKPSH.reshape(*x_BKPSH.shape[:2], -1, x_BKPSH.shape[-1])
