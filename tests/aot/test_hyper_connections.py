"""The kernels of hyper-connections, by the real compilers of TPUs."""

import pytest

from tests.aot.cases import V5E, V5P, by_chip
from tests.aot.compilers import answers

pytestmark = pytest.mark.aot

# Flash and Pro: verification, a prefill or a training step, a few tokens.
CHIPS = by_chip(
    ("4096 192", "7168 4096"),
    {V5E: ("7168 192", "4096 4096"), V5P: ("7168 8",)},
    quick=("4096 192", "7168 4096"),
)


@pytest.mark.parametrize("chip", CHIPS)
def test_streams_are_read_twice_and_written_once(chip):
    reports = answers("tpu", "compile_hyper", chip, *CHIPS[chip])
    for case, report in zip(CHIPS[chip], reports, strict=True):
        print(chip, case, report)
        assert report["kernels"] == 2, case
        # Coefficients: two dozen numbers of a token, and their turned copies.
        assert report["temp_bytes"] < 8e6, case
        if case.endswith(" 4096"):
            assert report["bytes"] < 1.1 * report["least_bytes"], case
