"""draft_sampling and verify by the compilers of TPUs, alone and in a decode loop."""

import pytest

from tests.aot.cases import ALL, V5E, V5P, V6E, by_chip
from tests.aot.compilers import answers

pytestmark = pytest.mark.aot

CHIPS = by_chip(
    ("verify flash", "draft flash", "verify pro sharded", "draft pro sharded"),
    {V5E: ("verify dense",), V5P: ("draft dense plain",), V6E: ("verify pro",)},
    quick=("verify flash", "draft flash", "verify pro sharded", "draft pro sharded"),
)


@pytest.mark.parametrize("chip", CHIPS)
def test_no_logits_are_written(chip):
    reports = answers("tpu", "compile_vocabulary", chip, *CHIPS[chip])
    for case, report in zip(CHIPS[chip], reports, strict=True):
        assert report["kernels"] == 1, case
        # What rows have in every lane is a thousandth of their logits, or a tenth of
        # those of one draft.
        assert report["temp_bytes"] < 0.15 * report["logits_bytes"], case


@pytest.mark.long
@pytest.mark.parametrize("coupling", ["rejection", "gumbel"] if ALL else ["rejection"])
def test_a_round_of_flash_writes_its_drafts_base_logits_and_no_others(coupling):
    """Unless a slot asks for what needs them: then they are there to be seen."""
    [report] = answers("tpu", "compile_streamed", "v5e:2x2", coupling)
    assert report["logits"] == ["5,32,129280"]
    assert report["asked_for"] > 1
