"""The kernels of the indexer, by the real compilers of TPUs and Hopper GPUs."""

import pytest

from tests.aot.cases import V5E, V5P, by_chip
from tests.aot.compilers import answers

pytestmark = pytest.mark.aot

# Flash at 128k positions, its pages, Pro at 1M, a prefill.
FLASH, PAGES = "32,6,32768,512", "32,6,32768,512,32"
CHIPS = by_chip(
    (FLASH, "8,8,262144,1024"),
    {V5E: ("1,4096,16384,512",), V5P: (PAGES,)},
    quick=(FLASH, PAGES),
)


@pytest.mark.parametrize("chip", CHIPS)
def test_nothing_is_sorted_and_no_scores_are_written(chip):
    reports = answers("tpu", "compile_indexer", chip, *CHIPS[chip])
    for case, report in zip(CHIPS[chip], reports, strict=True):
        slots, rows, *_ = map(int, case.split(","))
        assert report["kernels"] == 1 and not report["sorts"], case
        # Queries by groups and lists of pieces; scores would be a hundred times more.
        assert report["temp_bytes"] < 1e6 + 1e5 * slots * rows, case


@pytest.mark.long
def test_on_gpus_no_scores_of_single_heads_are_written():
    cases = (FLASH, PAGES)
    reports = answers("h100", "compile_indexer", "h100:1", *cases)
    for case, report in zip(cases, reports, strict=True):
        # Scores, then the choice: of the best of eights, of what those are of.
        assert report["kernels"] == 3, case
        assert not report["spilled"], report["registers"]
        # A score of each query and key, and what it is chosen by: 25 and 7 MB.
        assert report["temp_bytes"] < 45e6, case
