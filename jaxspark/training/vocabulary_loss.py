"""The vocabulary-wide part of the objective, its gradient made on the way forward.

Logits of all rows of a batch over a large vocabulary would not fit beside everything
else, and keeping them for the backward pass costs more time than making them. Row by
row of the block this makes logits, terms and the gradient of the weighted terms with
respect to the logits, and keeps only the gradients of what is small: hidden states,
latents of the sequential head, its output matrix. The head itself is frozen.

With q = softmax(u), p the target's probabilities, y the token, s = sign(q - p):

    d CE(q, y) / du = q - onehot(y)
    d |q - p|_1 / du = q * (s - sum(q * s))
    d CE(q, p) / du = q - p / sum(p)
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxspark.models.layers.linear import row_product
from jaxspark.training.objective import Objective, VocabularyTerms


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def vocabulary_terms(
    objective: Objective,
    hidden_GDN: Float[Array, "G D N"],
    latent_GRN: Float[Array, "G R N"] | None,
    w2_WR: Float[Array, "W R"] | None,
    head_WD: Float[Array, "W D"],
    target_GND: Float[Array, "G N D"],
    log_z_GN: Float[Array, "G N"],
    label_GN: Int[Array, "G N"],
    weight_GN: Float[Array, "G N"],
) -> tuple[Float[Array, ""], VocabularyTerms]:
    """The weighted numerator of ce, l1 and soft_ce, and the terms of every row.

    Only the numerator has a gradient, and only with respect to `hidden_GDN`,
    `latent_GRN` and `w2_WR`.

    Args:
      objective: weights of the terms.
      hidden_GDN: normed hidden states of the rows, logits u = head h (+ w2 latent).
      latent_GRN: latents of the sequential head; None without one.
      w2_WR: its output matrix.
      head_WD: rows of the LM head in the draft vocabulary.
      target_GND: the target's last hidden state at each row.
      log_z_GN: its log normaliser over the whole vocabulary.
      label_GN: place of the next token in the draft vocabulary, W if it is not there.
      weight_GN: weight of each row, 0 where it does not count.
    """
    result, _ = _forward(
        objective,
        hidden_GDN,
        latent_GRN,
        w2_WR,
        head_WD,
        target_GND,
        log_z_GN,
        label_GN,
        weight_GN,
        gradient=False,
    )
    return result


def _forward(
    objective,
    hidden_GDN,
    latent_GRN,
    w2_WR,
    head_WD,
    target_GND,
    log_z_GN,
    label_GN,
    weight_GN,
    *,
    gradient=True,
):
    def row(carry, inputs):
        total, dw2_WR = carry
        hidden_DN, latent_RN, target_ND, log_z_N, label_N, weight_N = inputs
        logits_NW = row_product(head_WD, hidden_DN)
        if w2_WR is not None:
            logits_NW = logits_NW + row_product(w2_WR, latent_RN)
        log_p_NW = row_product(head_WD, target_ND.T) - log_z_N[:, None]
        numerator_N, terms, d_NW = _row(
            objective, logits_NW, log_p_NW, label_N, gradient
        )
        total += jnp.sum(jnp.where(weight_N > 0, weight_N * numerator_N, 0))
        if not gradient:
            return (total, dw2_WR), (terms, None, None)
        d_NW = jnp.where(weight_N[:, None] > 0, weight_N[:, None] * d_NW, 0)
        d_NW = d_NW.astype(hidden_DN.dtype)
        dhidden_DN = _product("WD,NW->DN", head_WD, d_NW)
        dlatent_RN = None
        if w2_WR is not None:
            dlatent_RN = _product("WR,NW->RN", w2_WR, d_NW)
            dw2_WR += _product("NW,RN->WR", d_NW, latent_RN)
        return (total, dw2_WR), (terms, dhidden_DN, dlatent_RN)

    start = (jnp.float32(0), None if w2_WR is None else jnp.zeros_like(w2_WR))
    inputs = (hidden_GDN, latent_GRN, target_GND, log_z_GN, label_GN, weight_GN)
    (total, dw2_WR), (terms, dhidden_GDN, dlatent_GRN) = jax.lax.scan(
        row, start, inputs
    )
    return (total, terms), (dhidden_GDN, dlatent_GRN, dw2_WR)


def _backward(objective, gradients, cotangents):
    scale = cotangents[0]
    scaled = jax.tree.map(lambda g: (scale * g).astype(g.dtype), gradients)
    return (*scaled, None, None, None, None, None)


vocabulary_terms.defvjp(_forward, _backward)


def _product(indices, a, b):
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(indices, a, b, precision=exact)


def _row(objective, logits_NW, log_p_NW, label_N, gradient):
    """Numerators, terms and d numerator / d logits of N rows."""
    W = logits_NW.shape[-1]
    best_N1 = jnp.max(logits_NW, axis=-1, keepdims=True)
    shifted_NW = logits_NW - best_N1
    log_sum_N1 = jnp.log(jnp.sum(jnp.exp(shifted_NW), axis=-1, keepdims=True))
    log_q_NW = shifted_NW - log_sum_N1
    q_NW, p_NW = jnp.exp(log_q_NW), jnp.exp(log_p_NW)
    inside_N = jnp.sum(p_NW, axis=-1)
    sign_NW = jnp.sign(q_NW - p_NW)
    # Tokens that cannot be drafted have q = 0 and add their p.
    l1_N = jnp.sum(jnp.abs(q_NW - p_NW), axis=-1) + jnp.maximum(1 - inside_N, 0)
    known_N = label_N < W
    place_N1 = jnp.minimum(label_N, W - 1)[:, None]
    ce_N = -jnp.take_along_axis(log_q_NW, place_N1, axis=-1)[:, 0]
    ce_N = jnp.where(known_N, ce_N, 0)
    inside_N1 = jnp.maximum(inside_N, 1e-6)[:, None]
    soft_ce_N = -jnp.sum(p_NW * log_q_NW, axis=-1) / inside_N1[:, 0]
    # Whether the two best tokens are one, without an argmax, which is slow on CPU.
    target_best_NW = log_p_NW == jnp.max(log_p_NW, axis=-1, keepdims=True)
    terms = VocabularyTerms(
        ce_N=ce_N,
        l1_N=l1_N,
        soft_ce_N=soft_ce_N,
        agree_N=jnp.any(target_best_NW & (logits_NW == best_N1), axis=-1),
    )
    numerator_N = objective.ce * ce_N + objective.l1 * l1_N
    numerator_N += objective.soft_ce * soft_ce_N
    if not gradient:
        return numerator_N, terms, None
    d_NW = jnp.zeros_like(q_NW)
    if objective.ce:
        is_label_NW = jnp.arange(W) == place_N1
        d_NW += objective.ce * jnp.where(known_N[:, None], q_NW - is_label_NW, 0)
    if objective.l1:
        mean_N1 = jnp.sum(q_NW * sign_NW, axis=-1, keepdims=True)
        d_NW += objective.l1 * q_NW * (sign_NW - mean_N1)
    if objective.soft_ce:
        d_NW += objective.soft_ce * (q_NW - p_NW / inside_N1)
    return numerator_N, terms, d_NW
