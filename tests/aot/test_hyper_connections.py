"""The kernels of hyper-connections, by the real compilers of TPUs."""

import os

import pytest

from tests.aot.compilers import answers

pytestmark = pytest.mark.aot

# Flash and Pro: verification, a few tokens, a prefill or a training step.
CASES = ("4096 192", "7168 8", "7168 192", "4096 4096", "7168 4096")
CHIPS = ["v5e:2x2"]
if os.environ.get("JAXSPARK_AOT_ALL"):
    CHIPS += ["v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]


@pytest.mark.parametrize("chip", CHIPS)
def test_streams_are_read_twice_and_written_once(chip):
    reports = answers("tpu", "compile_hyper", chip, *CASES)
    for case, report in zip(CASES, reports, strict=True):
        print(chip, case, report)
        assert report["kernels"] == 2, case
        # Coefficients: two dozen numbers of a token, and their turned copies.
        assert report["temp_bytes"] < 8e6, case
        if case.endswith(" 4096"):
            assert report["bytes"] < 1.1 * report["least_bytes"], case
