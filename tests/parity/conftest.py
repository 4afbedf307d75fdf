"""Fixtures of the parity suite: the live oracle, and checkpoints to load."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from tests.parity.oracle_client import Oracle, oracle_python
from tests.parity.weights import random_weights


@pytest.fixture(scope="session")
def oracle():
    """The live oracle; tests that want it are skipped where PyTorch is not at hand."""
    python = oracle_python()
    if python is None:
        pytest.skip("no PyTorch: set JAXSPARK_ORACLE_PYTHON or run `make oracle`")
    process = Oracle(python)
    yield process
    process.close()


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a random checkpoint for (config, seed); returns its folder."""

    def write(config: dict, seed: int) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(random_weights(config, seed), tmp_path / "model.safetensors")
        return tmp_path

    return write
