"""The drafter that comes with the package: small, documented, calibrated.

That it is worth its round is shown where it drafts, in `exactness/test_smollm2`.
"""

import re

import jax.numpy as jnp
import pytest

from jaxspark import load_drafter
from jaxspark.calibration.files import load_calibration
from jaxspark.checkpoints import CheckpointError
from jaxspark.checkpoints.load import SHIPPED_DRAFTERS
from tests import zoo

FOLDER = SHIPPED_DRAFTERS["dspark"]


def test_it_is_small_and_says_what_it_is():
    files = {path.name: path for path in FOLDER.iterdir()}
    assert sum(path.stat().st_size for path in files.values()) <= 24e6
    assert {"config.json", "model.safetensors", "SHA256SUMS"} <= set(files)
    assert "loss" in files["training_log.jsonl"].read_text().splitlines()[0]
    card = files["README.md"].read_text()
    for heading in ("Data", "Recipe", "Measured", "Limits", "License"):
        assert f"\n## {heading}\n" in card
    for source in ("gsm8k", "gpteacher", "dolly", "oasst"):
        assert re.search(rf"\| {source}.*\| .*(MIT|Apache-2.0|CC-BY)", card), source


@pytest.mark.parametrize("coupling", ["rejection", "gumbel"])
@pytest.mark.parametrize("name", ["dspark", "hybrid:dspark"])
def test_it_is_calibrated_for_greedy_and_sampled_requests(name, coupling):
    calibration = load_calibration(name, coupling)
    calibration.check(7, coupling)
    assert calibration.fitted_at == (0.0, 1.0)


def test_it_says_what_is_usual():
    calibration = load_calibration("dspark", "rejection")
    usual_BUG = calibration.prior_survival(7, jnp.ones(1))
    assert jnp.all((usual_BUG >= 0) & (usual_BUG <= 1))
    # Blocks that differ: the best sixteenth survives nearly twice as often as the mean.
    first_U = usual_BUG[0, :, 0]
    assert 0.2 < first_U.mean() < 0.6 and first_U.max() > 1.8 * first_U.mean()


def test_another_target_is_told():
    with pytest.raises(CheckpointError, match="made for"):
        load_drafter("dspark", zoo.target())
