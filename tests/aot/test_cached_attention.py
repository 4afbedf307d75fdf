"""The kernel of cached_attention, by the real compilers of TPUs."""

import os

import pytest

from tests.aot.compilers import answers

pytestmark = pytest.mark.aot

# Qwen3-8B's heads verifying, and by pages; a chunk of prefill; SmolLM2's, padded.
CASES = (
    "bfloat16 64 6 4096 32 8 128 0",
    "bfloat16 64 6 4096 32 8 128 128",
    "bfloat16 4 512 8192 32 8 128 128",
    "float32 16 8 2048 9 3 128 0",
)
CHIPS = ["v5e:2x2"]
if os.environ.get("JAXSPARK_AOT_ALL"):
    CHIPS += ["v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]


@pytest.mark.parametrize("chip", CHIPS)
def test_the_cache_is_read_once_and_no_scores_are_written(chip):
    reports = answers("tpu", "compile_cached", chip, *CASES)
    for case, report in zip(CASES, reports, strict=True):
        mine, reference = report["mosaic_tpu"], report["xla"]
        assert mine["kernels"] == 1, case
        if reference["temp_bytes"] > 1e8:
            assert mine["temp_bytes"] < 0.2 * reference["temp_bytes"], case
    for report in reports[:2]:
        assert report["mosaic_tpu"]["bytes"] < 1.1 * report["cache_bytes"]
