"""Folders of `drafter_cases.py` on our side: made, read, written, drafted with."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from jaxspark.checkpoints import (
    Target,
    load_draft_checkpoint,
    load_target,
    save_draft_checkpoint,
)
from jaxspark.drafters import DraftContext
from jaxspark.models import FlatTokens
from tests.driver import Sampler, Session
from tests.parity import drafter_cases as cases
from tests.parity.weights import random_weights

TARGET_SEED = 3
TARGET_NAME = "the target"


def target(family: str, folder: Path) -> Target:
    """A target of `drafter_cases.TARGETS`, in a folder that is made for it."""
    config = cases.TARGETS[family]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_weights(config, TARGET_SEED), folder / "model.safetensors")
    return load_target(folder)


def description(folder: Path, target: Target) -> dict:
    """All of a drafter's folder but the numbers, which come from names and a seed."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    return {
        "config": _renamed(config, target.name, TARGET_NAME),
        "tensors": {
            n: [list(a.shape), a.dtype.name] for n, a in sorted(tensors.items())
        },
    }


def made_from(description: dict, target: Target, folder: Path) -> Path:
    """The folder of a description."""
    folder.mkdir()
    config = _renamed(description["config"], TARGET_NAME, target.name)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {n: shape for n, (shape, _) in description["tensors"].items()}
    target_weights = load_file(Path(target.name) / "model.safetensors")
    tensors = cases.drafter_weights(shapes, target_weights)
    for name, (_, kind) in description["tensors"].items():
        assert tensors[name].dtype.name == kind, name
    save_file(tensors, folder / "model.safetensors")
    return folder


def _renamed(config: dict, old: str, new: str) -> dict:
    """The configuration with another path of the target."""
    return json.loads(json.dumps(config).replace(json.dumps(old), json.dumps(new)))


def rewritten(name: str, source: Path, target: Target, folder: Path) -> Path:
    """The folder that we write of what we read in another."""
    save_draft_checkpoint(
        folder,
        load_draft_checkpoint(source, target.model),
        target.model,
        target_name=target.name,
        format=cases.peer(name),
    )
    return folder


def states(target: Target) -> list[np.ndarray]:
    """What the target's layers (the embedding first) say up to each anchor."""
    layers = range(-1, target.model.config.num_hidden_layers)
    session = Session(target.model, len(cases.ANCHORS), cases.SEQUENCE, taps=layers)
    return session.feed([ids[:n] for ids, n in zip(cases.tokens(), cases.ANCHORS)])[1]


def drafted(
    source: Path, target: Target, states: list[np.ndarray]
) -> dict[str, np.ndarray]:
    """What our drafter says after `states`: logits [A, G, W], confidence [A, G]."""
    model = target.model
    drafter = load_draft_checkpoint(source, model)
    ids_AS, anchors_A = cases.tokens(), np.array(cases.ANCHORS)
    slots, G = len(anchors_A), drafter.block_length
    width, taps = max(anchors_A), [tap + 1 for tap in drafter.taps]
    taps_AmSD = np.zeros((slots, len(taps), width, states[0].shape[-1]), np.float32)
    for slot, anchor in enumerate(anchors_A):
        taps_AmSD[slot, :, :anchor] = states[slot][taps]
    chosen_AG = np.stack([ids[n + 1 : n + 1 + G] for ids, n in zip(ids_AS, anchors_A)])

    def draw(logits_BW, j, ids_W):
        return jnp.asarray(chosen_AG)[:, j], logits_BW, logits_BW[:, 0]

    @jax.jit
    def run(taps_AmSD):
        tokens = FlatTokens.from_rows(
            jnp.asarray(ids_AS[:, :width]), jnp.zeros(slots, int), anchors_A
        )
        taps_TmD = tokens.flat(jnp.moveaxis(taps_AmSD, 2, 1))
        cache = drafter.init_cache(slots, cases.SEQUENCE)
        cache = drafter.observe(cache, taps_TmD, tokens)
        proposal, _ = drafter.propose(
            model,
            cache,
            DraftContext.of(jnp.asarray(ids_AS), jnp.asarray(anchors_A + 1)),
            Sampler(draw),
            G,
        )
        return proposal.q.log_q_BGW, proposal.confidence_BG

    logits_AGW, confidence_AG = run(taps_AmSD)
    return {"logits": np.asarray(logits_AGW), "confidence": np.asarray(confidence_AG)}
