"""DeepSeek-V4 equals Hugging Face transformers (live oracle, fresh seeds)."""

import numpy as np
import pytest

from jaxspark.checkpoints.deepseek_v4 import load_deepseek_v4
from jaxspark.checkpoints.deepseek_v4_config import v4_config_from_hf
from jaxspark.checkpoints.tree import Tensors
from tests.driver import Session
from tests.parity.test_dense import difference, fresh_seed
from tests.parity.v4_cases import lengths, random_config
from tests.parity.v4_weights import random_weights

pytestmark = pytest.mark.oracle
TOLERANCE = 3e-4


def made(config, seed):
    """Our model with the weights of a seed."""
    weights = random_weights(config, seed)
    shapes = {name: value.shape for name, value in weights.items()}
    tensors = Tensors(where="random", shapes=shapes, read=weights.__getitem__)
    return load_deepseek_v4(v4_config_from_hf(config), tensors, dtype="float32")


def a_case(seed):
    """A random configuration and a sequence for each interesting length."""
    config = random_config(seed)
    random = np.random.RandomState(seed)
    tokens = [random.randint(0, 61, length).tolist() for length in lengths(config)]
    return config, tokens


@pytest.mark.parametrize("attempt", range(3))
def test_random_models_equal_transformers(attempt, oracle, record_property):
    seed = fresh_seed()
    config, tokens = a_case(seed)
    reference = oracle.ask({"config": config, "seed": seed, "tokens": tokens})
    assert 2 < np.abs(reference["logits_0"]).max() < 60, seed
    model = made(config, seed)
    for chunk in (None, 1, 7, 64):
        logits, _ = Session(model, len(tokens), 304).feed(tokens, chunk=chunk)
        worst = difference(logits, reference)
        record_property(f"chunk_{chunk}", float(worst))
        assert worst <= TOLERANCE, (chunk, f"{seed=}", config)
