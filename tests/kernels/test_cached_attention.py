"""Every implementation of `cached_attention` agrees with attention in plain NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxspark.models import FlatTokens
from pallas_kernels import cached_attention
from pallas_kernels.cached_attention.api import IMPLEMENTATIONS

B, K, G, S, H, PAGE = 3, 3, 2, 16, 8, 4
COUNTS = np.array([4, 0, 2])


def numpy_attention(q, k, v, tokens, limits, scale):
    out = np.zeros(q.shape)
    for t, n in np.ndindex(q.shape[:2]):
        slot, seen = int(tokens.slots_T[t]), limits[t]
        scores = scale * k[slot, n // G, :seen] @ q[t, n]
        weights = np.exp(scores - scores.max())
        out[t, n] = weights / weights.sum() @ v[slot, n // G, :seen]
    return out


@pytest.fixture
def arrays():
    """Operands of six tokens, the last of which is padding."""
    random = np.random.default_rng(0)
    tokens = FlatTokens.from_rows(
        jnp.zeros((B, 4), jnp.int32), jnp.zeros(B, jnp.int32), jnp.asarray(COUNTS),
        capacity=7,
    )  # fmt: skip
    q = random.normal(size=(7, K * G, H))
    k, v = random.normal(size=(2, B, K, S, H))
    q, k, v = (jnp.asarray(each, jnp.float32) for each in (q, k, v))
    return q, k, v, tokens, jnp.asarray(random.integers(1, S + 1, 7))


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_each_token_sees_positions_below_its_limit(arrays, implementation):
    q, k, v, tokens, limits = arrays
    seen = cached_attention(*arrays, scale=H**-0.5, implementation=implementation)
    expected = numpy_attention(q, k, v, tokens, limits, H**-0.5)
    np.testing.assert_allclose(seen[:6], expected[:6], atol=2e-6)


def test_a_page_table_names_where_positions_lie(arrays):
    q, k, v, tokens, limits = arrays
    pages = np.random.default_rng(1).permutation(B * S // PAGE).reshape(B, -1)

    def paged(x_BKSH):
        rows = np.zeros((B * S // PAGE, K, PAGE, H), np.float32)
        parts = np.asarray(x_BKSH).reshape(B, K, -1, PAGE, H)
        rows[pages] = np.moveaxis(parts, 1, 2)
        return jnp.asarray(rows)

    whole = cached_attention(q, k, v, tokens, limits, scale=1.0)
    seen = cached_attention(
        q, paged(k), paged(v), tokens, limits, scale=1.0, pages_BP=jnp.asarray(pages)
    )
    np.testing.assert_allclose(seen[:6], whole[:6], atol=2e-6)


def test_garbage_past_the_limit_is_not_read(arrays):
    q, k, v, tokens, _ = arrays
    limits = jnp.full(7, 6)
    clean = cached_attention(q, k, v, tokens, limits, scale=1.0)
    dirty = cached_attention(
        q, k.at[:, :, 6:].set(1e4), v.at[:, :, 6:].set(-1e4), tokens, limits, scale=1.0
    )
    np.testing.assert_array_equal(clean, dirty)


def test_an_unknown_implementation_is_named(arrays):
    with pytest.raises(ValueError, match="no implementation 'cuda'.*'xla'"):
        cached_attention(*arrays, scale=1.0, implementation="cuda")
