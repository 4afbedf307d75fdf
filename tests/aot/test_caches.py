"""The compiled decode loop keeps every cache where it is.

The real loop is compiled by the real compilers of three platforms, without running it;
see `compile_round`. Nothing of a cache's size may be made anew, the caches come back in
the buffers they came in, and all other memory of the program is smaller.
"""

import json
import os
from functools import cache

import pytest

from tests.aot.compilers import answers

pytestmark = pytest.mark.aot

# Programs chosen so that drafters, types and couplings all meet; with two layers one
# cache is written while the other is in use. `make aot` compiles all of them, other
# runs one for the machine at hand and one for a TPU.
LOOPS = {
    "cpu": [
        {"drafter": "ngram", "dtype": "float32", "layers": 8},
        {"drafter": "dspark pruned", "dtype": "bfloat16", "coupling": "gumbel"},
        {"drafter": "hybrid", "dtype": "float32"},
        {"drafter": "eagle3", "dtype": "float32"},
        {"drafter": "hybrid", "dtype": "float32", "schedule": "lagged"},
        {"drafter": "eagle3", "dtype": "float32", "pages": True},
    ],
    "tpu": [
        {"drafter": "ngram", "dtype": "float32"},
        {"drafter": "dspark", "dtype": "bfloat16", "coupling": "gumbel"},
        {"drafter": "hybrid", "dtype": "bfloat16"},
        {"drafter": "eagle3", "dtype": "float32"},
        {"drafter": "dspark", "dtype": "bfloat16", "schedule": "lagged"},
        {"drafter": "dspark", "dtype": "bfloat16", "pages": True},
        {"drafter": "eagle3", "dtype": "float32", "pages": True},
    ],
    "h100": [
        {"drafter": "ngram", "dtype": "float32", "coupling": "gumbel"},
        {"drafter": "ngram", "dtype": "bfloat16", "pages": True},
        {"drafter": "dspark pruned", "dtype": "bfloat16", "schedule": "causal"},
    ],
}
if not os.environ.get("JAXSPARK_AOT_ALL"):
    LOOPS["tpu"], LOOPS["h100"] = [LOOPS["tpu"][1], LOOPS["tpu"][5]], []
    LOOPS["cpu"] = LOOPS["cpu"][-2:]
MISTAKES = {
    "cpu": [{"mistake": "transposed"}, {"mistake": "not donated"}],
    "tpu": [{"mistake": "transposed"}],
    "h100": [],
}


def cases(table):
    return [
        pytest.param(platform, case, id=" ".join([platform, *map(str, case.values())]))
        for platform, rows in table.items()
        for case in rows
    ]


@cache
def reports(platform: str) -> list[dict]:
    """Reports on all loops and mistakes of a platform, compiled by one process."""
    asked = map(json.dumps, LOOPS[platform] + MISTAKES[platform])
    return answers(platform, "compile_round", platform, *asked)


def report_on(platform, case):
    return reports(platform)[(LOOPS[platform] + MISTAKES[platform]).index(case)]


@pytest.mark.parametrize("platform, case", cases(LOOPS))
def test_no_cache_is_copied(platform, case):
    copies = report_on(platform, case)["copies"]
    listing = "\n".join(line[:300] for line in copies[:8])
    assert not copies, f"{len(copies)} arrays of a cache's size are new:\n{listing}"


@pytest.mark.parametrize("platform, case", cases(LOOPS))
def test_caches_stay_in_their_buffers(platform, case):
    report = report_on(platform, case)
    assert report["alias_bytes"] >= report["cache_bytes"]


@pytest.mark.parametrize("platform, case", cases(LOOPS))
def test_temporaries_are_smaller_than_the_caches(platform, case):
    report = report_on(platform, case)
    assert report["temp_bytes"] < report["cache_bytes"]


@pytest.mark.parametrize("platform, case", cases(MISTAKES))
def test_a_mistake_is_found(platform, case):
    report = report_on(platform, case)
    assert report["copies"]
    if case["mistake"] == "not donated":
        assert report["alias_bytes"] < report["cache_bytes"]
