"""The kernels of compress, by the real compilers of TPUs and Hopper GPUs."""

import pytest

from tests.aot.cases import ALL, V5E, V5P, by_chip
from tests.aot.compilers import answers

pytestmark = pytest.mark.aot

# Windows of so many positions, of which each token has a row twice where they overlap.
RATIOS = {"hca": 128, "csa": 4, "index": 4}
FLASH_INDEX, PRO_CSA = "flash index 32 6 131072", "pro csa 32 6 131072 pages"
COMMON = (
    *("flash hca 32 6 131072", "flash csa 32 6 131072"),
    *("pro hca 32 6 131072 pages", "pro index 32 6 131072 pages"),
)
QUICK = "flash hca 32 6 131072", PRO_CSA
CHIPS = by_chip(COMMON, {V5E: (FLASH_INDEX,), V5P: (PRO_CSA,)}, quick=QUICK)


@pytest.mark.parametrize("chip", CHIPS)
def test_windows_are_read_once_and_tables_written_in_place(chip):
    reports = answers("tpu", "compile_compress", chip, *CHIPS[chip])
    for case, report in zip(CHIPS[chip], reports, strict=True):
        ratio = RATIOS[case.split()[1]]
        assert report["kernels"] == 1, case
        assert not report["copies"], case
        assert report["temp_bytes"] < 2e6, case
        # A row is read and written; a window is as long as m rows, at the very most.
        row = report["row_bytes"] / (32 * 6)
        windows = 32 * -(-6 // ratio) * ratio * row
        assert report["bytes"] < 1.2 * (windows + 2 * report["row_bytes"]) + 1e6, case


def test_on_gpus_windows_are_read_where_they_end():
    cases = (*COMMON, FLASH_INDEX, PRO_CSA) if ALL else QUICK
    reports = answers("h100", "compile_compress", "h100:1", *cases)
    for case, report in zip(cases, reports, strict=True):
        assert report["kernels"] == 1 and not report["copies"], case
        assert not report.get("spilled"), case  # a kernel is assembled once
        assert report["temp_bytes"] < 2e6, case
        # Rows come, go into their ring, and are read once when their window ends.
        assert report["bytes"] < 1.2 * 4 * report["row_bytes"] + 1e6, case
