"""Annotations of shapes are checked where `make typecheck` asks for it."""

import os

import jax.numpy as jnp
import pytest

from jaxspark.models.layers.linear import matmul

CHECKED = bool(os.environ.get("JAXSPARK_TYPECHECK"))


@pytest.mark.skipif(not CHECKED, reason="annotations are checked by make typecheck")
def test_a_wrong_shape_is_named():
    from jaxtyping import TypeCheckError

    with pytest.raises(TypeCheckError, match="w_OI"):
        matmul(jnp.ones((2, 3)), jnp.ones(3))
    assert matmul(jnp.ones((2, 3)), jnp.ones((4, 3))).shape == (2, 4)
