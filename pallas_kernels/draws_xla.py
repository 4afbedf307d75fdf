"""Draws from rows of logits as XLA makes them: the specification of `draws`.

x = argmax (z - m)/t + n        mass = sum exp((z - m)/t)        m = max z
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.draws import FAR, Draws, Rows
from pallas_kernels.gumbel import gumbel


def draws_of(
    z_RV: Float[Array, "R V"],
    rows: Rows,
    ids_V: Int[Array, " V"],
    named_R: Int[Array, " R"] | None,
    *,
    certainty: bool,
) -> Draws:
    """Draws of rows of logits.

    Args:
      z_RV: logits.
      rows: how they are drawn.
      ids_V: of the tokens, by which they have noise and are named.
      named_R: a token of each row whose logit is told; None for none.
      certainty: whether to tell spread and others, rather than the whole mass.
    """
    top_R1 = jnp.max(z_RV, axis=1, keepdims=True)
    a_RV = (z_RV - top_R1) * rows.rate_R[:, None]
    weight_RV = jnp.exp(a_RV)
    noise_RV = jnp.zeros_like(z_RV)
    if rows.keys_R2 is not None:
        noise_RV = gumbel(rows.keys_R2[:, :1], rows.keys_R2[:, 1:], ids_V)
        noise_RV *= rows.sampled_R[:, None]
    score_RV = a_RV + noise_RV
    place_R = jnp.argmax(score_RV, axis=1).astype(jnp.int32)
    drawn_RV = jnp.arange(len(ids_V)) == place_R[:, None]

    def of_drawn(x_RV):
        return jnp.take_along_axis(x_RV, place_R[:, None], axis=1)[:, 0]

    if named_R is None:
        named_R = jnp.full_like(place_R, -1)
    is_named_RV = ids_V == named_R[:, None]
    whole_R = spread_R = others_R = None
    if certainty:
        spread_R = jnp.sum(weight_RV * jnp.maximum(a_RV, FAR), axis=1)
        others_R = jnp.sum(jnp.where(drawn_RV, 0.0, jnp.exp(score_RV)), axis=1)
    else:
        whole_R = jnp.sum(jnp.exp(z_RV - top_R1), axis=1)
    return Draws(
        place_R=place_R,
        logit_R=of_drawn(z_RV),
        noise_R=of_drawn(noise_RV),
        top_R=top_R1[:, 0],
        mass_R=jnp.sum(weight_RV, axis=1),
        named_R=jnp.max(jnp.where(is_named_RV, z_RV, -jnp.inf), axis=1),
        whole_R=whole_R,
        spread_R=spread_R,
        others_R=others_R,
    )
