"""The XLA reference, and the specification, of `cached_attention`.

Pages are read some at a time, as many as the longest slot has, with a running softmax:
putting them in order first would copy the cache.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.precision import precision
from pallas_kernels.ragged import Ragged

# Pages that are read at once: more cost memory, fewer cost steps.
PAGES = 4


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
    B, (_, K, _, H) = ragged.slots, k_BKSH.shape
    groups = q_TNH.shape[1] // K
    q_BQKgH = ragged.padded(q_TNH, 0).reshape(B, -1, K, groups, H)
    Q = q_BQKgH.shape[1]
    q_BKMH = jnp.moveaxis(q_BQKgH, 2, 1).reshape(B, K, Q * groups, H)
    limits_BM = jnp.repeat(ragged.padded(limits_T, 1), groups, axis=1)
    if pages_BP is None:
        scores_BKMS = _scores(q_BKMH, k_BKSH, limits_BM, 0, scale)
        weights_BKMS = jax.nn.softmax(scores_BKMS, axis=-1)
        o_BKMH = _weighted(weights_BKMS, v_BKSH)
    else:
        o_BKMH = _by_pages(q_BKMH, k_BKSH, v_BKSH, limits_BM, pages_BP, scale)
    o_BQKgH = jnp.moveaxis(o_BKMH.reshape(B, K, Q, groups, H), 1, 2)
    return ragged.flat(o_BQKgH.reshape(B, Q, K * groups, H).astype(q_TNH.dtype))


def _scores(q_BKMH, k_BKSH, limits_BM, first, scale):
    """Scores of positions from `first` on; a finite floor where one is not seen.

    It keeps rows without any visible position free of NaN.
    """
    scores_BKMS = scale * jnp.einsum(
        "BKMH,BKSH->BKMS",
        q_BKMH,
        k_BKSH,
        precision=precision(q_BKMH.dtype),
        preferred_element_type=jnp.float32,
    )
    position_S = first + jnp.arange(k_BKSH.shape[2])
    seen_BMS = position_S < limits_BM[..., None]
    floor = jnp.finfo(jnp.float32).min
    return jnp.where(seen_BMS[:, None], scores_BKMS, floor)


def _weighted(weights_BKMS, v_BKSH, wide=None):
    return jnp.einsum(
        "BKMS,BKSH->BKMH",
        weights_BKMS.astype(v_BKSH.dtype),
        v_BKSH,
        precision=precision(v_BKSH.dtype),
        preferred_element_type=wide,
    )


def _by_pages(q_BKMH, k_PKSH, v_PKSH, limits_BM, pages_BP, scale):
    """The same over pages, `PAGES` at a time, up to the highest limit."""
    B, K, M, H = q_BKMH.shape
    S, P = k_PKSH.shape[2], pages_BP.shape[1]
    at_once = min(PAGES, P)
    steps = -(-P // at_once)
    pages_BP = jnp.pad(pages_BP, ((0, 0), (0, steps * at_once - P)))
    needed = -(-jnp.max(limits_BM) // (S * at_once))

    def rows(x_PKSH, step):
        page_Bp = jax.lax.dynamic_slice_in_dim(
            pages_BP, step * at_once, at_once, axis=1
        )
        # Of each head its own: so they come in the order in which they are read.
        place_BKp = page_Bp[:, None] * K + jnp.arange(K)[:, None]
        return x_PKSH.reshape(-1, S, H)[place_BKp].reshape(B, K, at_once * S, H)

    def read(step, carry):
        o_BKMH, total_BKM, highest_BKM = carry
        scores_BKMS = _scores(
            q_BKMH, rows(k_PKSH, step), limits_BM, step * at_once * S, scale
        )
        higher_BKM = jnp.maximum(highest_BKM, scores_BKMS.max(axis=-1))
        before_BKM = jnp.exp(highest_BKM - higher_BKM)
        weights_BKMS = jnp.exp(scores_BKMS - higher_BKM[..., None])
        new_BKMH = _weighted(weights_BKMS, rows(v_PKSH, step), jnp.float32)
        return (
            o_BKMH * before_BKM[..., None] + new_BKMH,
            total_BKM * before_BKM + weights_BKMS.sum(axis=-1),
            higher_BKM,
        )

    start = (
        jnp.zeros((B, K, M, H), jnp.float32),
        jnp.zeros((B, K, M), jnp.float32),
        jnp.full((B, K, M), jnp.finfo(jnp.float32).min),
    )
    o_BKMH, total_BKM, _ = jax.lax.fori_loop(0, needed, read, start)
    return o_BKMH / total_BKM[..., None]
