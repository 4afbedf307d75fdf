"""What several files of this folder load."""

import pytest

from jaxspark.checkpoints import load_target


@pytest.fixture(scope="session")
def smollm2():
    """The built-in model, real weights."""
    return load_target("smollm2-135m-instruct")
