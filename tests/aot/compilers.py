"""Runs programs that compile for chips this machine need not have.

Their compilers lie in an environment of their own (`.venv-aot`) and must be known
before JAX is imported, so each program is a process and answers in lines of JSON.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILERS = Path(os.environ.get("JAXSPARK_AOT", ROOT / ".venv-aot"))
INSTALL = {"tpu": "make aot-tpu", "h100": "make aot"}
NEEDS = {
    "cpu": [],
    "tpu": ["libtpu"],
    "h100": ["jax_cuda13_plugin", "nvidia/cu13/bin/ptxas", "nvidia/cu13/nvvm"],
}


def environment(platform: str) -> dict[str, str]:
    """Where a process finds a compiler; skips the test without it."""
    missing = [name for name in NEEDS[platform] if not (COMPILERS / name).exists()]
    if missing:
        pytest.skip(
            f"no compiler for {platform}: {', '.join(missing)} not in {COMPILERS} "
            f"({INSTALL[platform]} installs it)"
        )
    return {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{ROOT}:{COMPILERS}" if NEEDS[platform] else str(ROOT),
        # No TPU is asked for or locked.
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def answers(platform: str, program: str, *arguments: str) -> list[dict]:
    """What a program of this folder prints; skips the test without its compiler."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.aot.{program}", *arguments],
        cwd=ROOT,
        env=os.environ | environment(platform),
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
