"""DeepSeek-V4's decode loop, compiled for three platforms without running it.

No cache is copied, and each program holds the kernels of its own platform, though one
machine traces them all. Flash in full size by this machine's own compiler; `make aot`
has a small one by those of a TPU and a GPU, and Flash on several (`test_sharded`).
"""

import pytest

from tests.aot.cases import ALL
from tests.aot.compilers import answers

pytestmark = pytest.mark.aot


PROGRAMS = [("cpu", "flash")]
if ALL:
    PROGRAMS += [("tpu", "mini pages"), ("h100", "mini")]


@pytest.mark.long
@pytest.mark.parametrize("platform, preset", PROGRAMS)
def test_no_cache_is_copied(platform, preset, record_property):
    [report] = answers(platform, "compile_deepseek_v4", platform, *preset.split())
    record_property("compile_seconds", report["seconds"])
    print(f"{preset} for {platform}: compiled in {report['seconds']} s")
    assert report["tables"] > 5
    assert not report["copies"], "\n".join(line[:300] for line in report["copies"])
    assert report["alias_bytes"] >= report["cache_bytes"]
    # Attention in each kind of layer and stage; experts of this size are XLA's.
    assert (report["kernels"] > 0) == (platform != "cpu")
