"""The kernel of grouped_matmul, by the real compilers of TPUs."""

import pytest

from tests.aot.cases import TPU7X, V5E, V5P, V6E, by_chip
from tests.aot.compilers import answers

pytestmark = pytest.mark.aot

CHIPS = by_chip(
    (
        *("flash up fp4", "pro down fp4 share"),
        *("flash down bfloat16 share", "pro up bfloat16 share"),
    ),
    {
        V5E: (
            *("flash up fp8 share", "flash up fp4 share x64"),
            *("flash up fp4 share prefill", "flash up fp4 share sharded"),
        ),
        V5P: ("flash down fp8 share gradients", "flash down float32 share"),
        V6E: ("pro down fp4 share gradients",),
        TPU7X: (
            "flash up bfloat16 share gradients",
            "flash down bfloat16 share sharded",
        ),
    },
    quick=("flash up fp4", "flash down bfloat16 share x64"),
)


@pytest.mark.parametrize("chip", CHIPS)
def test_weights_are_read_where_they_lie(chip):
    reports = answers("tpu", "compile_grouped", chip, *CHIPS[chip])
    for case, report in zip(CHIPS[chip], reports, strict=True):
        print(chip, case, f"{report['temp_bytes'] / 1e6:.1f} MB beside its arguments")
        assert report["kernels"] == 1 + ("gradients" in case), case
        if not {"share", "gradients"} & set(case.split()):
            # Rows in tiles, before and after; a layer's weights are gigabytes.
            assert report["temp_bytes"] < report["layer_bytes"] / 8, case
            assert report["bytes"] < 1.1 * report["layer_bytes"], case
