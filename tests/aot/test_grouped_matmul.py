"""The kernel of grouped_matmul, by the real compilers of TPUs."""

import os

import pytest

from tests.aot.compilers import answers

pytestmark = pytest.mark.aot

CHIPS = {"v5e:2x2": ["flash up fp4", "flash down bfloat16 share x64"]}
if os.environ.get("JAXSPARK_AOT_ALL"):
    every = [
        *(f"flash {matrix} fp4" for matrix in ("up", "down")),
        *(f"pro {matrix} fp4 share" for matrix in ("up", "down")),
        *(f"{size} up bfloat16 share" for size in ("flash", "pro")),
        *(f"{size} down bfloat16 share" for size in ("flash", "pro")),
        *("flash up fp8 share", "pro down fp8 share", "flash down float32 share"),
        *("flash up fp4 share x64", "flash down bfloat16 share x64"),
        *("flash up fp4 share prefill", "flash up bfloat16 share prefill"),
        *("flash up fp4 share sharded", "flash down bfloat16 share sharded"),
        *("flash up fp4 share gradients", "pro down fp4 share gradients"),
        *("flash up bfloat16 share gradients", "flash down fp8 share gradients"),
    ]
    chips = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
    CHIPS = {chip: every for chip in chips}


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
