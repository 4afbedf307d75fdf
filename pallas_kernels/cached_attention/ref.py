"""The XLA reference, and the specification, of `cached_attention`.

Pages are read one after the other, as many as the longest slot has, with a running
softmax: putting them in order first would copy the cache.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import expected_platform
from pallas_kernels.precision import precision
from pallas_kernels.ragged import Ragged

# Pages that are copied at once: more of them may be too many, fewer cost steps.
PAGES = 2


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
        scores_BKMS = _scores(q_BKMH, k_BKSH, limits_BM, scale)
        weights_BKMS = jax.nn.softmax(scores_BKMS, axis=-1)
        o_BKMH = _weighted(weights_BKMS, v_BKSH)
    else:
        o_BKMH = _by_pages(q_BKMH, k_BKSH, v_BKSH, limits_BM, pages_BP, scale)
    o_BQKgH = jnp.moveaxis(o_BKMH.reshape(B, K, Q, groups, H), 1, 2)
    return ragged.flat(o_BQKgH.reshape(B, Q, K * groups, H).astype(q_TNH.dtype))


def _scores(q_BKMH, k_BKSH, limits_BM, scale):
    """Scores of all positions; a finite floor where one is not seen.

    It keeps rows without any visible position free of NaN.
    """
    scores_BKMS = scale * jnp.einsum(
        "BKMH,BKSH->BKMS",
        q_BKMH,
        k_BKSH,
        precision=precision(q_BKMH.dtype),
        preferred_element_type=jnp.float32,
    )
    seen_BMS = jnp.arange(k_BKSH.shape[2]) < limits_BM[..., None]
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
    """The same over pages, in order, up to the highest limit.

    Pages are copied to their queries, a few at a time. On CPUs all queries go to their
    pages where that moves less: where slots have most of the pool, and share none of
    it. Outputs are the same, to the last bit. Elsewhere they might not be, because
    roundings of a product may depend on how many there are.
    """
    B, K, M, H = q_BKMH.shape
    pool, _, S, _ = k_PKSH.shape
    pages_BP = jnp.pad(pages_BP, ((0, 0), (0, -pages_BP.shape[1] % PAGES)))
    P = pages_BP.shape[1]
    seen_BPM = limits_BM[:, None] - S * jnp.arange(P)[:, None]
    needed = -(-jnp.max(limits_BM) // S)
    nothing = (
        jnp.zeros((B, K, M, H), jnp.float32),
        jnp.zeros((B, K, M), jnp.float32),
        jnp.full((B, K, M), jnp.finfo(jnp.float32).min),
    )

    def by_copies():
        def add(step, sums):
            def some(x_BP):
                return jax.lax.dynamic_slice_in_dim(x_BP, PAGES * step, PAGES, axis=1)

            # Of each head its own: so they come in the order in which they are read.
            place_XK = some(pages_BP).reshape(-1, 1) * K + jnp.arange(K)
            k_XKSH, v_XKSH = (x.reshape(-1, S, H)[place_XK] for x in (k_PKSH, v_PKSH))
            q_XKMH = jnp.repeat(q_BKMH, PAGES, axis=0)
            seen_XM = some(seen_BPM).reshape(-1, M)
            new_X = _of_pages(q_XKMH, k_XKSH, v_XKSH, seen_XM, scale)
            for first in range(PAGES):
                sums = _merge(sums, [x_X[first::PAGES] for x_X in new_X])
            return sums

        return jax.lax.fori_loop(0, -(-needed // PAGES), add, nothing)

    if not 1 < M <= S or expected_platform() != "cpu":
        o_BKMH, total_BKM, _ = by_copies()
        return o_BKMH / total_BKM[..., None]
    page_X, place_X = pages_BP.reshape(-1), jnp.arange(B * P)
    place_P = jnp.zeros((pool,), jnp.int32).at[page_X].set(place_X)
    own_P, seen_PM = place_P // P, seen_BPM.reshape(-1, M)[place_P]
    # On two CPU cores a page took 1.7 times as long to copy as to read in place.
    most = 5 * B * needed >= 3 * pool
    unshared = jnp.all((place_P[page_X] == place_X) | (page_X == 0))

    def in_place():
        new_P = _of_pages(q_BKMH[own_P], k_PKSH, v_PKSH, seen_PM, scale)

        def add(page, sums):
            page_B = jax.lax.dynamic_index_in_dim(pages_BP, page, 1, keepdims=False)
            return _merge(sums, [x_P[page_B] for x_P in new_P])

        return jax.lax.fori_loop(0, needed, add, nothing)

    o_BKMH, total_BKM, _ = jax.lax.cond(most & unshared, in_place, by_copies)
    return o_BKMH / total_BKM[..., None]


def _of_pages(q_XKMH, k_XKSH, v_XKSH, seen_XM, scale):
    """Sums over the first positions of some pages, as many as are seen of each.

    Returns:
      weighted values [X, K, M, H] and weights [X, K, M], both over e to the highest
      score, and that [X, K, M].
    """
    # Otherwise CPUs score again for each use, and roundings depend on the caller.
    scores_XKMS = jax.lax.optimization_barrier(_scores(q_XKMH, k_XKSH, seen_XM, scale))
    highest_XKM = scores_XKMS.max(axis=-1)
    weights_XKMS = jnp.exp(scores_XKMS - highest_XKM[..., None])
    o_XKMH = _weighted(weights_XKMS, v_XKSH, jnp.float32)
    # A sum's roundings depend on the number of sums, those of these products do not.
    ones_XKS1 = jnp.ones((*v_XKSH.shape[:-1], 1), v_XKSH.dtype)
    total_XKM = _weighted(weights_XKMS, ones_XKS1, jnp.float32)[..., 0]
    return o_XKMH, total_XKM, highest_XKM


def _merge(sums, more):
    """Sums over the positions of both, see `_of_pages`."""
    o_BKMH, total_BKM, highest_BKM = sums
    o1_BKMH, total1_BKM, highest1_BKM = more
    higher_BKM = jnp.maximum(highest_BKM, highest1_BKM)
    factor_BKM = jnp.exp(highest_BKM - higher_BKM)
    factor1_BKM = jnp.exp(highest1_BKM - higher_BKM)
    new_BKMH, new_BKM = jax.lax.optimization_barrier(
        (o1_BKMH * factor1_BKM[..., None], total1_BKM * factor1_BKM)
    )
    return (
        o_BKMH * factor_BKM[..., None] + new_BKMH,
        total_BKM * factor_BKM + new_BKM,
        higher_BKM,
    )
