"""The grouped product on TPUs, by tokamax: right when simulated, lean when compiled."""

import pytest

from tests.aot.compilers import answers

pytestmark = pytest.mark.aot


def test_tokamaxs_kernel_is_right_and_copies_no_weights():
    [figures] = answers("tpu", "compile_grouped")
    print(figures)
    assert figures["float32"] < 1e-4
    assert figures["bfloat16"] < 0.02
    for rows in ("few rows", "many rows"):
        assert figures[rows]["kernels"] == 1
        # A layer's experts alone would be an eighth.
        assert figures[rows]["temp_bytes"] < figures[rows]["weight_bytes"] / 16
