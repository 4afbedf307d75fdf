"""Training data and drafters for a tiny target."""

import jax
import numpy as np

from jaxspark.training.data.documents import Document
from jaxspark.training.data.packing import Packed, pack
from jaxspark.training.features import Features, target_features
from tests import zoo

LENGTH = 48


def document(size: int, prompt: int, seed: int = 0) -> Document:
    """Random tokens, the first `prompt` of them not trainable."""
    ids_L = np.random.default_rng([seed, size]).integers(0, zoo.VOCAB, size)
    return Document(ids_L.astype(np.int32), np.arange(size) >= prompt)


def packed(*sizes: int, length: int = LENGTH, seed: int = 0) -> Packed:
    """Documents of these sizes, a quarter of each its prompt."""
    documents = [
        document(size, max(1, size // 4), seed + i) for i, size in enumerate(sizes)
    ]
    return pack(documents, length)


def features(model, drafter, batch: Packed) -> Features:
    """The target's view of a batch."""
    return target_features(model, batch, taps=drafter.config.target_layer_ids)


def close(a, b, atol=1e-5):
    """Trees of arrays agree, relative to the largest entry of each array."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        scale = max(1.0, float(np.abs(y).max(initial=0.0)))
        np.testing.assert_allclose(x / scale, y / scale, atol=atol, rtol=0)
