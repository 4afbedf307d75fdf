"""A window's entry on a TPU, 128 channels at a time: softmax, norm, and turn."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged import LANES

_UNSEEN = -1e30


def entry_lanes(values_ref, logits_ref, earlier, weight_ref, cos_1R, sin_1R, sizes):
    """A window's entry, 128 channels at a time."""
    parts, span = range(0, sizes.width, LANES), sizes.span
    position_p1 = jax.lax.broadcasted_iota(jnp.int32, (span, 1), 0)
    there_p1 = (position_p1 >= span - sizes.ratio) | earlier
    pooled = []
    for part in parts:
        value_pl = values_ref[:, pl.ds(part, LANES)]
        logit_pl = logits_ref[:, pl.ds(part, LANES)]
        if sizes.series > 1:
            value_pl = jnp.where(there_p1, value_pl, 0.0)
            logit_pl = jnp.where(there_p1, logit_pl, _UNSEEN)
        weight_pl = jnp.exp(logit_pl - logit_pl.max(0, keepdims=True))
        total_1l = weight_pl.sum(0, keepdims=True)
        pooled.append((weight_pl * value_pl).sum(0, keepdims=True) / total_1l)
    squares = sum(x_1l * x_1l for x_1l in pooled).sum(1, keepdims=True)
    norm = jax.lax.rsqrt(squares / sizes.width + sizes.eps)
    lanes = [
        x * norm * weight_ref[:, pl.ds(part, LANES)] for x, part in zip(pooled, parts)
    ]
    turning = cos_1R.shape[1] // LANES
    for place in range(turning):
        here = slice(place * LANES, (place + 1) * LANES)
        part = len(lanes) - turning + place
        lanes[part] = (
            lanes[part] * cos_1R[:, here] + swapped(lanes[part]) * sin_1R[:, here]
        )
    return lanes


def swapped(x_1l):
    """Neighbours in each other's places."""
    lane_1l = jax.lax.broadcasted_iota(jnp.int32, x_1l.shape, 1)
    after, before = pltpu.roll(x_1l, LANES - 1, 1), pltpu.roll(x_1l, 1, 1)
    return jnp.where(lane_1l % 2 == 0, after, before)
