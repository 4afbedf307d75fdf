"""The compiled decode loop keeps every cache where it is.

The real loop is compiled by the real compilers of three platforms, without running it;
see `compile_round`. Nothing of a cache's size may be made anew, the caches come back in
the buffers they came in, and all other memory of the program is smaller.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.aot

ROOT = Path(__file__).parents[2]
COMPILERS = Path(os.environ.get("JAXSPARK_AOT", ROOT / ".venv-aot"))
NEEDS = {
    "cpu": [],
    "tpu": ["libtpu"],
    "h100": ["jax_cuda13_plugin", "nvidia/cu13/bin/ptxas", "nvidia/cu13/nvvm"],
}
INSTALL = {"tpu": "make aot-tpu", "h100": "make aot"}

# Few programs, chosen so that drafters, types and couplings all meet; with two layers
# one cache is written while the other is in use.
LOOPS = {
    "cpu": [
        {"drafter": "ngram", "dtype": "float32", "layers": 30},
        {"drafter": "dspark pruned", "dtype": "bfloat16", "coupling": "gumbel"},
        {"drafter": "hybrid", "dtype": "float32"},
        {"drafter": "eagle3", "dtype": "float32"},
        {"drafter": "hybrid", "dtype": "float32", "schedule": "lagged"},
    ],
    "tpu": [
        {"drafter": "ngram", "dtype": "float32"},
        {"drafter": "dspark", "dtype": "bfloat16", "coupling": "gumbel"},
        {"drafter": "hybrid", "dtype": "bfloat16"},
        {"drafter": "eagle3", "dtype": "float32"},
        {"drafter": "dspark", "dtype": "bfloat16", "schedule": "lagged"},
    ],
    "h100": [
        {"drafter": "ngram", "dtype": "float32", "coupling": "gumbel"},
        {"drafter": "dspark pruned", "dtype": "bfloat16", "schedule": "causal"},
    ],
}
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
    missing = [name for name in NEEDS[platform] if not (COMPILERS / name).exists()]
    if missing:
        pytest.skip(
            f"no compiler for {platform}: {', '.join(missing)} not in {COMPILERS} "
            f"({INSTALL[platform]} installs it)"
        )
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{ROOT}:{COMPILERS}" if NEEDS[platform] else str(ROOT),
        # No TPU is asked for or locked.
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    asked = map(json.dumps, LOOPS[platform] + MISTAKES[platform])
    done = subprocess.run(
        [sys.executable, "-m", "tests.aot.compile_round", platform, *asked],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


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
