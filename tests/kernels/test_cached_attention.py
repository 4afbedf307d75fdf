"""Every implementation of `cached_attention` agrees with attention in plain NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cached_attention
from pallas_kernels.cached_attention.api import IMPLEMENTATIONS

B, K, M, S, H = 2, 3, 5, 17, 8


def numpy_attention(q, k, v, limits, scale):
    out = np.zeros(q.shape)
    for b, h, m in np.ndindex(B, K, M):
        seen = limits[b, m]
        scores = scale * k[b, h, :seen] @ q[b, h, m]
        weights = np.exp(scores - scores.max())
        out[b, h, m] = weights / weights.sum() @ v[b, h, :seen]
    return out


@pytest.fixture
def arrays():
    random = np.random.default_rng(0)
    q = random.normal(size=(B, K, M, H))
    k, v = random.normal(size=(2, B, K, S, H))
    return q, k, v, random.integers(1, S + 1, (B, M))


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_each_row_sees_positions_below_its_limit(arrays, implementation):
    q, k, v, limits = arrays
    seen = cached_attention(
        *(jnp.asarray(each, jnp.float32) for each in (q, k, v)),
        jnp.asarray(limits),
        scale=H**-0.5,
        implementation=implementation,
    )
    np.testing.assert_allclose(
        seen, numpy_attention(q, k, v, limits, H**-0.5), atol=2e-6
    )


def test_garbage_past_the_limit_is_not_read(arrays):
    q, k, v, _ = (jnp.asarray(each, jnp.float32) for each in arrays)
    limits = jnp.full((B, M), 6)
    clean = cached_attention(q, k, v, limits, scale=1.0)
    dirty = cached_attention(
        q, k.at[:, :, 6:].set(1e4), v.at[:, :, 6:].set(-1e4), limits, scale=1.0
    )
    np.testing.assert_array_equal(clean, dirty)


def test_an_unknown_implementation_is_named(arrays):
    with pytest.raises(ValueError, match="no implementation 'cuda'.*'xla'"):
        cached_attention(*arrays, scale=1.0, implementation="cuda")
