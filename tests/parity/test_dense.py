"""Llama and Qwen3 equal Hugging Face transformers (live oracle, fresh seeds)."""

import numpy as np
import pytest

from jaxspark.checkpoints import load_target, save_target
from tests.driver import Session
from tests.parity.cases import CASES, random_tokens
from tests.parity.prompts import PROMPTS

pytestmark = pytest.mark.oracle
TOLERANCE = 2e-4


def difference(ours, reference, name="logits"):
    """Largest absolute difference over all sequences."""
    return max(
        np.abs(mine - reference[f"{name}_{i}"]).max() for i, mine in enumerate(ours)
    )


@pytest.mark.parametrize("name", CASES)
def test_random_models_equal_transformers(
    name, oracle, seed, tmp_path, record_property
):
    config = CASES[name]
    tokens = random_tokens(config, seed)
    request = {"config": config, "seed": seed, "tokens": tokens, "hidden": True}
    reference = oracle.ask(request | {"save": str(tmp_path)})
    assert 2 < np.abs(reference["logits_0"]).max() < 40, seed
    model = load_target(str(tmp_path)).model

    layers = config["num_hidden_layers"]
    taps = tuple(range(-1, layers - 1))
    # How passes are cut is one question, what a configuration says another.
    for chunk in (None, 1, 7, 64) if name in ("llama", "qwen3") else (7,):
        session = Session(model, len(tokens), 80, taps=taps)
        logits, tapped = session.feed(tokens, chunk=chunk)
        worst = difference(logits, reference)
        record_property(f"chunk_{chunk}", float(worst))
        assert worst <= TOLERANCE, (name, chunk, f"{seed=}")
        for i, taps_mTD in enumerate(tapped):
            # Hidden state id + 1 is the output of layer id; -1 is the embedding.
            states_mTD = reference[f"hidden_{i}"][:layers]
            scale = np.abs(states_mTD).max()
            worst = np.abs(taps_mTD - states_mTD).max() / scale
            assert worst <= TOLERANCE, (name, "taps", chunk, f"{seed=}")


def test_slots_of_different_age_decode_together(oracle, seed, tmp_path):
    """Prefill of one slot, decode of another and an idle slot share a pass."""
    config = CASES["qwen3"]
    tokens = random_tokens(config, seed, (40, 23, 31))
    request = {"config": config, "seed": seed, "tokens": tokens}
    reference = oracle.ask(request | {"save": str(tmp_path)})
    session = Session(load_target(str(tmp_path)).model, 3, 48)
    random = np.random.default_rng(seed)
    fed, logits = [0, 0, 0], [[], [], []]
    while any(done < len(row) for done, row in zip(fed, tokens)):
        counts = random.integers(0, 9, 3)
        if not counts.any():
            continue
        parts = [r[f : f + c] for r, f, c in zip(tokens, fed, counts)]
        if not any(parts):
            continue
        padded = session.feed(parts, chunk=8)[0]
        for slot, part in enumerate(parts):
            fed[slot] += len(part)
            logits[slot].append(padded[slot])
    logits = [np.concatenate(part) for part in logits]
    assert difference(logits, reference) <= TOLERANCE, f"{seed=}"


@pytest.mark.long
def test_smollm2_equals_transformers(oracle, smollm2, smollm2_path, record_property):
    """Both sides read the GGUF file with their own code; then prefill and decode."""
    text = oracle.ask({"gguf": str(smollm2_path), "text": PROMPTS})
    tokens = [text[f"ids_{i}"].tolist() for i in range(len(PROMPTS))]
    reference = oracle.ask({"gguf": str(smollm2_path), "tokens": tokens})
    session, begun = Session(smollm2.model, len(tokens), 160), [r[:-3] for r in tokens]
    parts = [session.feed(begun, chunk=64)[0]]
    parts += [session.feed([row[-3:] for row in tokens], chunk=1)[0]]
    logits = [np.concatenate(pair) for pair in zip(*parts)]
    worst = difference(logits, reference)
    record_property("difference", float(worst))
    assert worst <= TOLERANCE


@pytest.mark.long
def test_exported_smollm2_loads_in_transformers(
    oracle, smollm2, smollm2_path, tmp_path, record_property
):
    tokens = [list(range(1000, 1040))]
    reference = oracle.ask({"gguf": str(smollm2_path), "tokens": tokens})
    folder = tmp_path / "smollm2"
    save_target(folder, smollm2)
    exported = oracle.ask({"folder": str(folder), "tokens": tokens})
    worst = difference([exported["logits_0"]], reference)
    record_property("difference", float(worst))
    assert worst <= 1e-5
