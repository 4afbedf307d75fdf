"""Rotary: pairs of neighbours turn by a token's angles."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels import Rotary
from pallas_kernels.rotary import right_angles

ANGLES = np.random.default_rng(0).normal(size=(3, 4))
ROTARY = Rotary(*(jnp.asarray(f(ANGLES), jnp.float32) for f in (np.cos, np.sin)))
X_TNH = np.random.default_rng(1).normal(size=(3, 2, 16)).astype(np.float32)


def test_the_last_pairs_turn_as_complex_numbers():
    pairs = X_TNH[..., 8::2] + 1j * X_TNH[..., 9::2]
    pairs = pairs * np.exp(1j * ANGLES)[:, None]
    turned = np.asarray(ROTARY(jnp.asarray(X_TNH)))
    np.testing.assert_array_equal(turned[..., :8], X_TNH[..., :8])
    np.testing.assert_allclose(turned[..., 8::2], pairs.real, atol=1e-6)
    np.testing.assert_allclose(turned[..., 9::2], pairs.imag, atol=1e-6)


def test_the_inverse_turns_back():
    turned = ROTARY.inverse(ROTARY(jnp.asarray(X_TNH)))
    np.testing.assert_allclose(turned, X_TNH, atol=1e-6)


def test_lanes_and_right_angles_are_the_same_rotation():
    """Of more channels than turn, too."""
    cos_TL, sin_TL = jnp.moveaxis(ROTARY.lanes(12), 1, 0)
    x_TNL = jnp.asarray(X_TNH[..., 4:])
    mine = x_TNL * cos_TL[:, None] + x_TNL @ right_angles(12) * sin_TL[:, None]
    np.testing.assert_allclose(mine, ROTARY(jnp.asarray(X_TNH))[..., 4:], atol=1e-6)
