"""verify: draws behind rows of the target, against float64 and JAX's own noise.

One suite for all implementations; kernels run in simulated memory, where what was never
written is NaN and two accesses that nothing orders are an error.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Draws, verify
from pallas_kernels.draws import combined
from pallas_kernels.verify import mosaic_tpu
from pallas_kernels.verify.api import IMPLEMENTATIONS
from tests.kernels.drawn import check, rows_of, simulated

ROWS, WIDTH, VOCAB = 19, 128, 700


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Two tiles of rows, three of tokens for each core, the last of which is short."""
    monkeypatch.setattr(mosaic_tpu, "ROWS", 16)
    monkeypatch.setattr(mosaic_tpu, "TOKENS", 128)


def drawn(implementation, *operands, **named) -> Draws:
    with simulated(implementation):
        run = jax.jit(verify, static_argnames="implementation")
        return jax.device_get(run(*operands, **named, implementation=implementation))


def matrices(dtype=jnp.float32, rows=ROWS, vocab=VOCAB):
    random = np.random.default_rng(0)
    hidden_TD, head_VD = (
        random.normal(size=(rows, WIDTH)),
        random.normal(size=(vocab, WIDTH)),
    )
    hidden_TD, head_VD = jnp.asarray(hidden_TD, dtype), jnp.asarray(head_VD, dtype)
    exact = (np.asarray(x, np.float64) for x in (hidden_TD, head_VD))
    return hidden_TD, head_VD, np.einsum("TD,VD->TV", *exact)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("dtype", "noisy"), [(jnp.float32, True), (jnp.bfloat16, False)], ids=str
)
def test_rows_draw_what_float64_draws(name, dtype, noisy):
    hidden_TD, head_VD, z_TV = matrices(dtype)
    rows, noise = rows_of(ROWS, noisy=noisy)
    named_T = np.random.default_rng(1).integers(-1, VOCAB, ROWS)
    draws = drawn(name, hidden_TD, head_VD, rows, named_T=jnp.asarray(named_T))
    check(draws, z_TV, rows, noise(np.arange(VOCAB)))
    named = np.where(named_T < 0, -np.inf, z_TV[np.arange(ROWS), named_T])
    np.testing.assert_allclose(draws.named_R, named, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_parts_of_a_vocabulary_draw_what_the_whole_does(name):
    """Shards of unlike sizes, whose noise and names go by ids."""
    hidden_TD, head_VD, z_TV = matrices()
    rows, noise = rows_of(ROWS)
    named_T, parts = jnp.full((ROWS,), 300), []
    for first, end in ((0, 129), (129, VOCAB)):
        part = drawn(
            *(name, hidden_TD, head_VD[first:end], rows), named_T=named_T, first=first
        )
        parts.append(replace(part, place_R=part.place_R + first))
    both = jax.tree.map(lambda *x: jnp.stack(x), *parts[::-1])
    draws = combined(both, rows.rate_R)
    check(draws, z_TV, rows, noise(np.arange(VOCAB)))
    np.testing.assert_allclose(draws.named_R, z_TV[:, 300], rtol=1e-5)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_lowest_of_equals_is_drawn_and_rows_of_nothing_harm_nobody(name):
    """Whole numbers: bests are equal across lanes, tiles and cores."""
    hidden_TD = np.zeros((4, WIDTH), np.float32)
    hidden_TD[:3, :3] = np.eye(3)
    hidden_TD[3] = np.nan
    head_VD = np.zeros((VOCAB, WIDTH), np.float32)
    for row, equals in enumerate([(5, 133, 690), (255, 256), (699, 400)]):
        head_VD[list(equals), row] = 7
    rows, _ = rows_of(4, noisy=False)
    draws = drawn(name, jnp.asarray(hidden_TD), jnp.asarray(head_VD), rows)
    assert draws.place_R[:3].tolist() == [5, 255, 400]
    assert np.isfinite(draws.whole_R[:3]).all()


def test_what_the_kernel_cannot_do_is_named():
    hidden_TD, head_VD, _ = matrices()
    rows, _ = rows_of(ROWS)
    with pytest.raises(ValueError, match="multiples of 128"):
        verify(hidden_TD[:, :100], head_VD[:, :100], rows, implementation="mosaic_tpu")
    with pytest.raises(ValueError, match="one type"):
        half_VD = head_VD.astype(jnp.bfloat16)
        verify(hidden_TD, half_VD, rows, implementation="mosaic_tpu")
