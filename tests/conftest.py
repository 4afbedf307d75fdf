"""What all tests share."""

import gc

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """A worker compiles thousands of programs; those of a finished module may go."""
    yield
    jax.clear_caches()
    gc.collect()
