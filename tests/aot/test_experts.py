"""Experts of many chips, by a TPU's compiler: no work on room that is empty."""

import pytest

from tests.aot.cases import ALL
from tests.aot.compilers import answers


@pytest.mark.aot
@pytest.mark.skipif(not ALL, reason="compiles for a minute: make aot")
def test_a_layer_moves_little_beside_its_weights():
    """A chip of 16 gets 1,152 pairs on average, and 18,432 at worst."""
    [found] = answers("tpu", "compile_experts", "v5p:2x2x4", "expert:16", "192")
    assert not found["worst_case"]
    assert found["moved"] < 1.7 * found["weights"]
    # The room for 18,432 outputs, and blocks of 1,728.
    assert found["temporary"] < 0.3 * 2**30
