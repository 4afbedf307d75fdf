"""Golden files: what the oracle said once, for machines without PyTorch.

A random model's file holds its configuration, seed, tokens and logits: the weights come
back from the seed. For the real model it holds the 20 best tokens of every fourth
position and a random projection of all logits.
"""

import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "golden"
SMOLLM2 = FOLDER / "smollm2.npz"
PROJECTED = 8
BEST = 20
STRIDE = 4


def projection(vocab: int) -> np.ndarray:
    """[V, 8] of random signs / sqrt(V): every logit takes part in every number."""
    signs = np.random.RandomState(7).randint(0, 2, (vocab, PROJECTED)) * 2 - 1
    return signs / np.sqrt(vocab)


def summary(logits_TV: np.ndarray) -> dict[str, np.ndarray]:
    """What is kept of the logits of one sequence."""
    logits_TV = logits_TV.astype(np.float64)
    some_tV = logits_TV[::STRIDE]
    best_tX = np.argsort(-some_tV, axis=1)[:, :BEST]
    return {
        "best_ids": best_tX.astype(np.int32),
        "best_logits": np.take_along_axis(some_tV, best_tX, axis=1).astype("f4"),
        "projected": (logits_TV @ projection(logits_TV.shape[1])).astype("f4"),
    }


def save(path: Path, arrays: dict, **header) -> None:
    """Writes arrays and a JSON header."""
    np.savez_compressed(path, header=json.dumps(header), **arrays)


def load(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Header and arrays."""
    with np.load(path) as file:
        arrays = dict(file)
    return json.loads(str(arrays.pop("header"))), arrays
