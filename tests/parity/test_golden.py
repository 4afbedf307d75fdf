"""Llama, Qwen3 and DeepSeek-V4 equal what transformers once computed (no PyTorch)."""

import numpy as np
import pytest

from jaxspark.checkpoints import load_target
from tests.driver import Session
from tests.parity import golden
from tests.parity.cases import CASES
from tests.parity.v4_cases import V4_SEEDS, random_config
from tests.parity.v4_model import made

TOLERANCE, V4_TOLERANCE = 2e-4, 3e-4


@pytest.mark.parametrize("name", CASES)
def test_random_models_equal_golden(name, checkpoint, record_property):
    header, arrays = golden.load(golden.FOLDER / f"{name}.npz")
    assert header["config"] == CASES[name], "stale: run tests.parity.make_golden"
    model = load_target(str(checkpoint(header["config"], header["seed"]))).model
    tokens = header["tokens"]
    # How passes are cut is one question, what a configuration says another.
    for chunk in (None, 5) if name in ("llama", "qwen3") else (5,):
        logits, _ = Session(model, len(tokens), 64).feed(tokens, chunk=chunk)
        for i, logits_TV in enumerate(logits):
            worst = np.abs(logits_TV - arrays[f"logits_{i}"]).max()
            record_property(f"chunk_{chunk}_{i}", float(worst))
            assert worst <= TOLERANCE, (chunk, i)


@pytest.mark.parametrize(
    "seed", [pytest.param(V4_SEEDS[0], marks=pytest.mark.long), *V4_SEEDS[1:]]
)
def test_deepseek_v4_equals_golden(seed, record_property):
    header, arrays = golden.load(golden.FOLDER / f"deepseek_v4_{seed}.npz")
    assert header["config"] == random_config(seed), "stale: run make_golden"
    model, tokens = made(header["config"], header["seed"]), header["tokens"]
    for chunk in (None, 5) if seed == V4_SEEDS[-1] else (5,):
        logits, _ = Session(model, len(tokens), 144).feed(tokens, chunk=chunk)
        for i, logits_TV in enumerate(logits):
            worst = np.abs(logits_TV - arrays[f"logits_{i}"]).max()
            record_property(f"chunk_{chunk}_{i}", float(worst))
            assert worst <= V4_TOLERANCE, (chunk, i)


def test_old_spelling_of_rope_means_the_same(checkpoint):
    """Checkpoints before `rope_parameters` say `rope_theta` and `rope_scaling`."""
    header, arrays = golden.load(golden.FOLDER / "llama_llama3.npz")
    config = header["config"]
    scaling = dict(config.pop("rope_parameters"))
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = scaling
    model = load_target(str(checkpoint(config, header["seed"]))).model
    logits, _ = Session(model, 3, 64).feed(header["tokens"])
    assert np.abs(logits[0] - arrays["logits_0"]).max() <= TOLERANCE


def test_smollm2_equals_golden(smollm2, record_property):
    header, arrays = golden.load(golden.SMOLLM2)
    tokens = header["tokens"]
    logits, _ = Session(smollm2.model, len(tokens), 160).feed(tokens, chunk=16)
    for i, logits_TV in enumerate(logits):
        some_tV = logits_TV[:: golden.STRIDE]
        best_tX = np.take_along_axis(some_tV, arrays[f"best_ids_{i}"], axis=1)
        worst = np.abs(best_tX - arrays[f"best_logits_{i}"]).max()
        projected = logits_TV @ golden.projection(logits_TV.shape[1])
        spread = np.abs(projected - arrays[f"projected_{i}"]).max()
        record_property(f"text_{i}", [float(worst), float(spread)])
        assert worst <= TOLERANCE, i
        # Sums over all logits: a common shift of 1e-5 adds up to 1e-3.
        assert spread <= 1e-3, i
