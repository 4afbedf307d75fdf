"""The compiled decode loop keeps every cache where it is.

The real loop is compiled by the real compilers of three platforms, without running it;
see `compile_round`. Nothing of a cache's size may be made anew, the caches come back in
the buffers they came in, and all other memory of the program is smaller.
"""

import json

import pytest

from tests.aot.cases import ALL
from tests.aot.compilers import answers

pytestmark = pytest.mark.aot

# Programs chosen so that drafters, types and couplings all meet; with two layers one
# cache is written while the other is in use. `make aot` compiles all of them, other
# runs two for the machine at hand and two for a TPU. A process each: so workers share.
LOOPS = {
    "cpu": [
        {"drafter": "ngram", "dtype": "float32", "layers": 8},
        {"drafter": "dspark pruned", "dtype": "bfloat16", "coupling": "gumbel"},
        {"drafter": "hybrid", "dtype": "float32", "schedule": "lagged"},
        {
            "drafter": "eagle3",
            "pages": True,
            "schedule": "lagged",
            "coupling": "gumbel",
        },
        {"drafter": "eagle3", "dtype": "float32", "pages": True},
    ],
    "tpu": [
        {"drafter": "dspark", "dtype": "bfloat16", "coupling": "gumbel"},
        {"drafter": "dspark", "dtype": "bfloat16", "pages": True},
        {"drafter": "ngram", "dtype": "float32"},
        {"drafter": "hybrid", "dtype": "bfloat16", "schedule": "lagged"},
        {"drafter": "dspark", "schedule": "lagged", "coupling": "gumbel"},
        {"drafter": "eagle3", "dtype": "float32"},
    ],
    "h100": [
        {"drafter": "ngram", "dtype": "float32", "coupling": "gumbel"},
        {"drafter": "ngram", "dtype": "bfloat16", "pages": True},
        {"drafter": "dspark pruned", "dtype": "bfloat16", "schedule": "causal"},
        {"drafter": "dspark", "pages": True, "schedule": "free", "coupling": "gumbel"},
    ],
}
MISTAKES = {
    "cpu": [{"mistake": "transposed"}, {"mistake": "not donated"}],
    "tpu": [{"mistake": "transposed"}],
}
if not ALL:
    LOOPS = {"cpu": LOOPS["cpu"][-2:], "tpu": LOOPS["tpu"][:2]}


def cases(table):
    return [
        pytest.param(
            platform,
            case,
            id=" ".join([platform, *map(str, case.values())]),
            marks=[pytest.mark.long] if platform == "tpu" and not ALL else [],
        )
        for platform, rows in table.items()
        for case in rows
    ]


def report_on(platform, case):
    [report] = answers(platform, "compile_round", platform, json.dumps(case))
    return report


@pytest.mark.parametrize("platform, case", cases(LOOPS))
def test_caches_stay_where_they_are(platform, case):
    """No copies, the same buffers, and temporaries that are smaller."""
    report = report_on(platform, case)
    copies = report["copies"]
    listing = "\n".join(line[:300] for line in copies[:8])
    assert not copies, f"{len(copies)} arrays of a cache's size are new:\n{listing}"
    assert report["alias_bytes"] >= report["cache_bytes"]
    assert report["temp_bytes"] < report["cache_bytes"]


@pytest.mark.parametrize("platform, case", cases(MISTAKES))
def test_a_mistake_is_found(platform, case):
    report = report_on(platform, case)
    assert report["copies"]
    if case["mistake"] == "not donated":
        assert report["alias_bytes"] < report["cache_bytes"]
