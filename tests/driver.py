"""What tests of models, drafters and decoding drive them with."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspark.drafters import Drawn
from jaxspark.models import FlatTokens


@partial(jax.jit, static_argnames=("graphdef", "taps", "capacity"), donate_argnums=2)
def forward(
    graphdef, params, cache, ids_BQ, starts_B, counts_B, taps=(), capacity=None
):
    """One pass of rows [B, Q]; returns logits [B, Q, V], taps [m, B, Q, D], cache."""
    model = nnx.merge(graphdef, params)
    tokens = FlatTokens.from_rows(ids_BQ, starts_B, counts_B, capacity=capacity)
    x_TD, taps_TmD, cache = model(tokens, cache, taps=taps)
    logits_BQV = tokens.padded(model.logits(x_TD), 0.0)
    return logits_BQV, jnp.moveaxis(tokens.padded(taps_TmD, 0.0), 2, 0), cache


class Session:
    """A model, its cache and how far each slot has come."""

    def __init__(self, model, slots, length, *, taps=()):
        self.graphdef, self.params = nnx.split(model)
        self.cache = model.init_cache(slots, length)
        self.lengths_B = np.zeros(slots, np.int32)
        self.taps = tuple(taps)

    def rewind(self, lengths_B):
        """Forgets positions from `lengths_B` on, by nothing but a smaller length."""
        self.lengths_B = np.minimum(self.lengths_B, np.asarray(lengths_B, np.int32))

    def feed(self, rows, *, chunk=None, capacity=None):
        """Appends one list of token ids to every slot, `chunk` tokens a pass.

        Returns:
          logits [t, V] and taps [m, t, D] of every slot's new tokens.
        """
        rows = [np.asarray(row, np.int32) for row in rows]
        longest = max(map(len, rows))
        chunk = longest if chunk is None else chunk
        logits, taps = [[] for _ in rows], [[] for _ in rows]
        for start in range(0, longest, chunk):
            parts = [row[start : start + chunk] for row in rows]
            counts_B = np.array([len(part) for part in parts], np.int32)
            ids_BQ = np.zeros((len(rows), chunk), np.int32)
            for slot, part in enumerate(parts):
                ids_BQ[slot, : len(part)] = part
            logits_BQV, taps_mBQD, self.cache = forward(
                self.graphdef,
                self.params,
                self.cache,
                ids_BQ,
                self.lengths_B,
                counts_B,
                taps=self.taps,
                capacity=capacity,
            )
            self.lengths_B = self.lengths_B + counts_B
            logits_BQV, taps_mBQD = np.asarray(logits_BQV), np.asarray(taps_mBQD)
            for slot, count in enumerate(counts_B):
                logits[slot].append(logits_BQV[slot, :count])
                taps[slot].append(taps_mBQD[:, slot, :count])
        return (
            [np.concatenate(part) for part in logits],
            [np.concatenate(part, axis=1) for part in taps],
        )


@dataclass(frozen=True)
class Sampler:
    """A `DraftSampler` made of a function that returns what `Drawn` holds."""

    draw: Any
    streams: bool = False

    def __call__(self, logits_BW, j, ids_W) -> Drawn:
        return Drawn(*self.draw(logits_BW, j, ids_W))

    def stream(self, logits, j, latent_BR, ids_W):
        """It does not."""
        raise NotImplementedError

    def suggested(self, certainty_BG):
        """Nothing."""
        return jnp.zeros_like(certainty_BG)


def greedy_draw(logits_BW, j, ids_W):
    """Draws the best token; scores its first logit."""
    place_B = jnp.argmax(logits_BW, -1).astype(jnp.int32)
    token_B = place_B if ids_W is None else ids_W[place_B]
    return token_B, logits_BW, logits_BW[:, 0]
