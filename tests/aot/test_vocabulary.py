"""draft_sampling and verify by the compilers of TPUs, alone and in a decode loop."""

import os

import pytest

from tests.aot.compilers import answers

pytestmark = pytest.mark.aot

CASES = ["verify flash", "draft flash", "verify pro sharded", "draft pro sharded"]
CHIPS, COUPLINGS = ["v5e:2x2"], ["rejection"]
if os.environ.get("JAXSPARK_AOT_ALL"):
    CASES += ["verify pro", "draft pro", "verify dense", "draft dense plain"]
    CHIPS += ["v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]
    COUPLINGS += ["gumbel"]


@pytest.mark.parametrize("chip", CHIPS)
def test_no_logits_are_written(chip):
    reports = answers("tpu", "compile_vocabulary", chip, *CASES)
    for case, report in zip(CASES, reports, strict=True):
        assert report["kernels"] == 1, case
        # What rows have in every lane is a thousandth of their logits, or a tenth of
        # those of one draft.
        assert report["temp_bytes"] < 0.15 * report["logits_bytes"], case


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_a_round_of_flash_writes_its_drafts_base_logits_and_no_others(coupling):
    """Unless a slot asks for what needs them: then they are there to be seen."""
    [report] = answers("tpu", "compile_streamed", "v5e:2x2", coupling)
    assert report["logits"] == ["5,32,129280"]
    assert report["asked_for"] > 1
