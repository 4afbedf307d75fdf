"""DeepSeek-V4 equals Hugging Face transformers (live oracle, fresh seeds)."""

import numpy as np
import pytest

from jaxspark.checkpoints import load_target, save_deepseek_v4
from tests.driver import Session
from tests.parity.test_dense import difference
from tests.parity.v4_cases import BASE, lengths, random_config
from tests.parity.v4_model import chosen_entries, closest_choice, made

pytestmark = pytest.mark.oracle
TOLERANCE = 3e-4
NEARLY = 1e-5


@pytest.mark.long
@pytest.mark.parametrize("chunks", [(1, 64), (7,)], ids=str)
def test_random_models_equal_transformers(chunks, oracle, seed):
    """Prefill, chunked prefill and decode, at lengths around every boundary."""
    config = random_config(seed)
    random = np.random.RandomState(seed)
    tokens = [random.randint(0, 61, length).tolist() for length in lengths(config)]
    request = {"config": config, "seed": seed, "tokens": tokens, "chosen": True}
    reference = oracle.ask(request)
    assert 1 < np.abs(reference["logits_0"]).max() < 60, seed
    model = made(config, seed)
    for chunk in chunks:
        logits, _ = Session(model, len(tokens), 304).feed(tokens, chunk=chunk)
        for number, (mine, row) in enumerate(zip(logits, tokens)):
            worst = np.abs(mine - reference[f"logits_{number}"]).max()
            # Between two that are nearly as good, rounding chooses.
            same = worst <= TOLERANCE or closest_choice(model, row) < NEARLY
            assert same, (chunk, number, worst, f"{seed=}", config)

    longest = len(tokens) - 1
    mine = chosen_entries(model, tokens[longest])
    theirs = {
        int(name.rsplit("_", 1)[1]): value
        for name, value in reference.items()
        if name.startswith(f"chosen_{longest}_")
    }
    assert mine.keys() == theirs.keys()
    for layer, chosen_TX in theirs.items():
        for query, (ours, expected) in enumerate(zip(mine[layer], chosen_TX)):
            assert set(ours) - {-1} == set(expected) - {-1}, (seed, layer, query)


@pytest.mark.long
def test_what_transformers_saves_is_read(oracle, seed, tmp_path):
    """It mixes released names with its own."""
    tokens = [np.random.RandomState(seed).randint(0, 61, 40).tolist()]
    request = {"config": BASE, "seed": seed, "tokens": tokens}
    reference = oracle.ask(request | {"save": str(tmp_path)})
    model = load_target(str(tmp_path)).model
    logits, _ = Session(model, 1, 64).feed(tokens)
    assert difference(logits, reference) <= TOLERANCE, seed


def test_what_is_saved_is_read_by_transformers(oracle, seed, tmp_path):
    tokens = [np.random.RandomState(seed).randint(0, 61, 40).tolist()]
    reference = oracle.ask({"config": BASE, "seed": seed, "tokens": tokens})
    folder = tmp_path / "model"
    save_deepseek_v4(folder, made(BASE, seed), quantized=False)
    seen = oracle.ask({"folder": str(folder), "tokens": tokens})
    assert difference([seen["logits_0"]], reference) <= 1e-4
