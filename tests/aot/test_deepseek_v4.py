"""DeepSeek-V4's decode loop, compiled without running it: no cache is copied.

Flash in full size by this machine's own compiler, a small one by the TPU's.
"""

import pytest

from tests.aot.compilers import answers

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("platform, preset", [("cpu", "flash"), ("tpu", "mini")])
def test_no_cache_is_copied(platform, preset, record_property):
    [report] = answers(platform, "compile_deepseek_v4", platform, preset)
    record_property("compile_seconds", report["seconds"])
    print(f"{preset} for {platform}: compiled in {report['seconds']} s")
    assert report["tables"] > 5
    assert not report["copies"], "\n".join(line[:300] for line in report["copies"])
    assert report["alias_bytes"] >= report["cache_bytes"]
