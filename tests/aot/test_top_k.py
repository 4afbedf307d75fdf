"""The kernel of top_k, by the real compilers of TPUs."""

import os

import pytest

from tests.aot.compilers import answers

pytestmark = pytest.mark.aot

# Flash at 128k positions, Pro at 1M.
CASES = ("192,32768,512", "64,262144,1024")
CHIPS = ["v5e:2x2"]
if os.environ.get("JAXSPARK_AOT_ALL"):
    CHIPS += ["v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]


@pytest.mark.parametrize("chip", CHIPS)
def test_nothing_is_sorted_and_nothing_but_places_is_written(chip):
    cases = CASES if os.environ.get("JAXSPARK_AOT_ALL") else CASES[:1]
    reports = answers("tpu", "compile_top_k", chip, *cases)
    for case, report in zip(cases, reports, strict=True):
        assert report["kernels"] == 1 and not report["sorts"], case
        assert report["temp_bytes"] < 1e6, case
