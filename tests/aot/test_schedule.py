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
    timer = by_schedule("v5p:2x2x1", seconds=300, gigabytes=12)
    fits, refused = timer(problem, [{"tokens": 2048}, {"tokens": 1000}])
    # 10 MB of logits and weights at 2,765 GB/s, and the noise of each token.
    assert 3.7e-6 < fits.seconds < 20e-6
    assert refused.seconds is None and "expected a power of two" in refused.why
