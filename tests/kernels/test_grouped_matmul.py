"""grouped_matmul: every row meets its group's matrix, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul

SIZES = {
    "even": [4, 4, 4],
    "some empty": [0, 11, 0, 1, 0],
    "one has all": [0, 0, 20],
    "none": [0, 0],
    "tiles and a bit": [130, 1, 300, 9],
}


def case(sizes, seed=0, rows=None):
    random = np.random.default_rng(seed)
    rows = sum(sizes) + 3 if rows is None else rows
    x_AI = random.normal(size=(rows, 6)).astype(np.float32)
    w_GOI = random.normal(size=(2 * len(sizes), 5, 6)).astype(np.float32)
    group_A = np.repeat(np.arange(len(sizes)), sizes)
    return x_AI, w_GOI, np.array(sizes), group_A


def dense(x_AI, w_GOI, group_A, group_offset=0):
    used = jnp.einsum("aoi,ai->ao", w_GOI[group_offset + group_A], x_AI[: len(group_A)])
    return jnp.zeros((len(x_AI), w_GOI.shape[1])).at[: len(group_A)].set(used)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("second", [False, True])
def test_rows_meet_their_groups_matrix(name, second):
    x_AI, w_GOI, group_sizes_E, group_A = case(SIZES[name])
    group_offset = len(group_sizes_E) * second
    seen = jax.jit(grouped_matmul)(
        x_AI, w_GOI, group_sizes_E, group_offset=group_offset
    )
    np.testing.assert_allclose(
        seen, dense(x_AI, w_GOI, group_A, group_offset), atol=1e-4
    )


@pytest.mark.parametrize("name", SIZES)
def test_gradients_are_those_of_the_dense_product(name):
    x_AI, w_GOI, group_sizes_E, group_A = case(SIZES[name])
    weight = np.random.default_rng(1).normal(size=(len(x_AI), 5))

    def ours(x, w):
        return jnp.sum(
            weight * grouped_matmul(x, w, group_sizes_E, group_offset=1) ** 2
        )

    def theirs(x, w):
        return jnp.sum(weight * dense(x, w, group_A, 1) ** 2)

    seen = jax.grad(ours, (0, 1))(x_AI, w_GOI)
    for mine, expected in zip(seen, jax.grad(theirs, (0, 1))(x_AI, w_GOI)):
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-3)


def test_bfloat16_sums_in_float32():
    x_AI, w_GOI, group_sizes_E, group_A = case([40, 40])
    seen = grouped_matmul(
        jnp.asarray(x_AI, jnp.bfloat16), jnp.asarray(w_GOI, jnp.bfloat16), group_sizes_E
    )
    assert seen.dtype == jnp.bfloat16
    expected = dense(x_AI, w_GOI, group_A)
    assert np.abs(np.asarray(seen, np.float32) - expected).max() < 0.1


def test_widths_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="width 6"):
        grouped_matmul(jnp.ones((2, 6)), jnp.ones((1, 5, 7)), jnp.array([2]))


def test_an_unknown_implementation_is_an_error():
    x_AI, w_GOI, group_sizes_E, _ = case([1])
    with pytest.raises(ValueError, match="xla"):
        grouped_matmul(x_AI, w_GOI, group_sizes_E, implementation="cuda")
