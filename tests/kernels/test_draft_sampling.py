"""draft_sampling: a step of a sequential head, against float64 and JAX's own noise.

One suite for all implementations; kernels run in simulated memory, where what was never
written is NaN and two accesses that nothing orders are an error.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import draft_sampling
from pallas_kernels.draft_sampling import mosaic_tpu
from pallas_kernels.draft_sampling.api import IMPLEMENTATIONS
from tests.kernels.drawn import check, rows_of, simulated

STEPS, RANK, VOCAB = 3, 24, 700


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Three tiles of tokens for each core, the last of which is short."""
    monkeypatch.setattr(mosaic_tpu, "TOKENS", 128)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("slots", "dtype", "noisy", "pruned"),
    [
        (5, jnp.float32, True, False),
        (16, jnp.bfloat16, True, True),
        (1, jnp.bfloat16, False, False),
    ],
    ids=str,
)
def test_a_step_draws_what_float64_draws(name, slots, dtype, noisy, pruned):
    """Other steps' logits are NaN; a pruned vocabulary's noise goes by its ids."""
    random = np.random.default_rng(slots)
    base_GBW = np.full((STEPS, slots, VOCAB), np.nan, np.float32)
    base_GBW[1] = random.normal(size=(slots, VOCAB))
    latent_BR = jnp.asarray(random.normal(size=(slots, RANK)), dtype)
    weight_WR = jnp.asarray(random.normal(size=(VOCAB, RANK)), dtype)
    exact = (np.asarray(x, np.float64) for x in (latent_BR, weight_WR))
    z_BW = base_GBW[1] + np.einsum("BR,WR->BW", *exact)
    first, ids_W = 40, 40 + np.arange(VOCAB)
    if pruned:
        ids_W = np.sort(random.choice(5000, VOCAB, replace=False))
    rows, noise = rows_of(slots, noisy=noisy)
    with simulated(name):
        run = jax.jit(draft_sampling, static_argnames="implementation")
        draws = run(
            *(jnp.asarray(base_GBW), 1, latent_BR, weight_WR, rows),
            first=first,
            ids_W=jnp.asarray(ids_W) if pruned else None,
            implementation=name,
        )
        draws = jax.device_get(draws)
    check(draws, z_BW, rows, noise(ids_W))


def test_what_the_kernel_cannot_do_is_named():
    rows, _ = rows_of(2)
    operands = jnp.zeros((1, 2, 9)), 0, jnp.zeros((2, 8)), jnp.zeros((9, 8))
    with pytest.raises(ValueError, match="one type"):
        latent_BR = operands[2].astype(jnp.bfloat16)
        draft_sampling(
            *operands[:2], latent_BR, operands[3], rows, implementation="mosaic_tpu"
        )
