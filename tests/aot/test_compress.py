"""The kernels of compress, by the real compilers of TPUs and Hopper GPUs."""

import os

import pytest

from tests.aot.compilers import answers

pytestmark = pytest.mark.aot

# Windows of so many positions, of which each token has a row twice where they overlap.
CASES = {
    "flash hca 32 6 131072": 128,
    "flash csa 32 6 131072": 4,
    "flash index 32 6 131072": 4,
    "pro hca 32 6 131072 pages": 128,
    "pro csa 32 6 131072 pages": 4,
    "pro index 32 6 131072 pages": 4,
}
CHIPS = ["v5e:2x2"]
if os.environ.get("JAXSPARK_AOT_ALL"):
    CHIPS += ["v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]


@pytest.mark.parametrize("chip", CHIPS)
def test_windows_are_read_once_and_tables_written_in_place(chip):
    reports = answers("tpu", "compile_compress", chip, *CASES)
    for (case, ratio), report in zip(CASES.items(), reports, strict=True):
        assert report["kernels"] == 1, case
        assert not report["copies"], case
        assert report["temp_bytes"] < 2e6, case
        # A row is read and written; a window is as long as m rows, at the very most.
        row = report["row_bytes"] / (32 * 6)
        windows = 32 * -(-6 // ratio) * ratio * row
        assert report["bytes"] < 1.2 * (windows + 2 * report["row_bytes"]) + 1e6, case


def test_on_gpus_windows_are_read_where_they_end():
    reports = answers("h100", "compile_compress", "h100:1", *CASES)
    for case, report in zip(CASES, reports, strict=True):
        assert report["kernels"] == 1 and not report["copies"], case
        assert not report.get("spilled"), case  # a kernel is assembled once
        assert report["temp_bytes"] < 2e6, case
        # Rows come, go into their ring, and are read once when their window ends.
        assert report["bytes"] < 1.2 * 4 * report["row_bytes"] + 1e6, case
