"""The static schedule that sizes of blocks are ranked by, from the TPU's compiler."""

import pytest

from jaxspark.tuning.problems import PROBLEMS
from jaxspark.tuning.search import by_schedule
from tests.aot.compilers import environment

pytestmark = pytest.mark.aot


def test_a_compiler_times_a_kernel_and_says_why_it_cannot(monkeypatch):
    for name, value in environment("tpu").items():
        monkeypatch.setenv(name, value)
    [problem] = (each for each in PROBLEMS if each.name == "draft_sampling flash")
    fits, too_large = by_schedule("v5e:2x2")(
        problem, [{"tokens": 2048}, {"tokens": 1 << 16}]
    )
    # 16 MB of logits and weights, at 819 GB/s.
    assert 1.0 < fits.seconds / 20e-6 < 2.0
    assert too_large.seconds is None and "vmem" in too_large.why.lower()
