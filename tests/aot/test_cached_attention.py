"""The kernel of cached_attention, by the real compilers of TPUs."""

import pytest

from tests.aot.cases import V5E, V5P, by_chip
from tests.aot.compilers import answers

pytestmark = pytest.mark.aot

# Qwen3-8B's heads verifying, and by pages; a chunk of prefill; SmolLM2's, padded.
VERIFYING, PAGES = "bfloat16 64 6 4096 32 8 128 0", "bfloat16 64 6 4096 32 8 128 128"
CHIPS = by_chip(
    (VERIFYING, PAGES),
    {
        V5E: ("bfloat16 4 512 8192 32 8 128 128",),
        V5P: ("float32 16 8 2048 9 3 128 0",),
    },
    quick=(VERIFYING, PAGES),
)


@pytest.mark.parametrize("chip", CHIPS)
def test_the_cache_is_read_once_and_no_scores_are_written(chip):
    reports = answers("tpu", "compile_cached", chip, *CHIPS[chip])
    for case, report in zip(CHIPS[chip], reports, strict=True):
        assert report["kernels"] == 1, case
        # Queries by groups, and outputs; scores are a hundred times as much.
        assert report["temp_bytes"] < 4 * report["query_bytes"] + 1e6, case
        if case in (VERIFYING, PAGES):
            assert report["bytes"] < 1.1 * report["cache_bytes"], case
