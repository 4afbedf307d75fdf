"""The kernels of sparse_attention, by the real compilers of TPUs and Hopper GPUs."""

import pytest

from tests.aot.cases import ALL, TPU7X, V5E, V5P, V6E, by_chip
from tests.aot.compilers import answers

pytestmark = pytest.mark.aot

CHIPS = by_chip(
    ("flash chosen", "flash limits", "pro chosen", "pro limits"),
    {
        V5E: ("long chosen", "flash limits sharded", "pro chosen gradients"),
        V5P: ("flash chosen sharded", "train limits gradients"),
        V6E: ("flash chosen float32", "train chosen gradients"),
        TPU7X: ("pro limits gradients",),
    },
    quick=("flash chosen", "flash limits sharded"),
) | {
    "h100:4": (
        *("flash chosen", "flash limits paged", "flash limits narrow"),
        *("flash chosen sharded", "pro chosen", "pro limits"),
        *("train chosen gradients", "pro limits gradients"),
    )
    if ALL
    else ("flash chosen", "pro limits")
}


@pytest.mark.parametrize("chip", CHIPS)
def test_a_layer_is_read_where_it_lies(chip):
    platform = "h100" if "h100" in chip else "tpu"
    reports = answers(platform, "compile_sparse", chip, *CHIPS[chip])
    for case, report in zip(CHIPS[chip], reports, strict=True):
        print(chip, case, f"{report['temp_bytes'] / 1e6:.1f} MB beside its arguments")
        # A register too many would go to memory in every chunk.
        assert not report.get("spilled"), (case, report["registers"])
        backward = 2 if platform == "h100" else 1
        assert report["kernels"] == 1 + backward * ("gradients" in case), case
        # A layer's entries are 34 MB. Long passes have larger things than that. What
        # gradients of 4,096 queries take is an eighth of XLA's 10.4 GB: the output,
        # and on TPUs queries, outputs' gradients and queries' in the kernel's order.
        large = "long" in case or "gradients" in case
        most = 1.3e9 if "train" in case and platform == "tpu" else 500e6
        assert report["temp_bytes"] < (most if large else 16e6), case
        copies = "\n".join(line[:300] for line in report["copies"])
        assert large or not copies, f"{case}:\n{copies}"
