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

from jaxspark.training.objective import Objective, VocabularyTerms
from pallas_kernels.precision import precision


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def vocabulary_terms(
    objective: Objective,
    hidden_GND: Float[Array, "G N D"],
    latent_GNR: Float[Array, "G N R"] | None,
    w2_WR: Float[Array, "W R"] | None,
    head_WD: Float[Array, "W D"],
    target_GND: Float[Array, "G N D"],
    log_z_GN: Float[Array, "G N"],
    label_GN: Int[Array, "G N"],
    weight_GN: Float[Array, "G N"],
) -> tuple[Float[Array, ""], VocabularyTerms]:
    """The weighted numerator of ce, l1 and soft_ce, and the terms of every row.

    Only the numerator has a gradient, and only with respect to `hidden_GND`,
    `latent_GNR` and `w2_WR`.

    Args:
      objective: weights of the terms.
      hidden_GND: normed hidden states of the rows, logits u = head h (+ w2 latent).
      latent_GNR: latents of the sequential head; None without one.
      w2_WR: its output matrix.
      head_WD: rows of the LM head in the draft vocabulary.
      target_GND: the target's last hidden state at each row.
      log_z_GN: its log normalizer over the whole vocabulary.
      label_GN: place of the next token in the draft vocabulary, W if it is not there.
      weight_GN: weight of each row, 0 where it does not count.
    """
    result, _ = _forward(
        objective,
        hidden_GND,
        latent_GNR,
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
    hidden_GND,
    latent_GNR,
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
        hidden_ND, latent_NR, target_ND, log_z_N, label_N, weight_N = inputs
        logits_WN = head_columns(head_WD, hidden_ND)
        if w2_WR is not None:
            logits_WN += head_columns(w2_WR, latent_NR)
        log_p_WN = head_columns(head_WD, target_ND) - log_z_N
        # Made once, not again in each of their readers.
        logits_WN, log_p_WN = jax.lax.optimization_barrier((logits_WN, log_p_WN))
        numerator_N, terms, d_WN = _row(
            objective, logits_WN, log_p_WN, label_N, gradient
        )
        total += jnp.sum(jnp.where(weight_N > 0, weight_N * numerator_N, 0))
        if not gradient:
            return (total, dw2_WR), (terms, None, None)
        d_WN = jnp.where(weight_N > 0, weight_N * d_WN, 0).astype(hidden_ND.dtype)
        dhidden_ND = _dot(d_WN.T, head_WD).astype(hidden_ND.dtype)
        dlatent_NR = None
        if w2_WR is not None:
            dlatent_NR = _dot(d_WN.T, w2_WR)
            dw2_WR += _dot(d_WN, latent_NR)
        return (total, dw2_WR), (terms, dhidden_ND, dlatent_NR)

    start = (jnp.float32(0), None if w2_WR is None else jnp.zeros_like(w2_WR))
    inputs = (hidden_GND, latent_GNR, target_GND, log_z_GN, label_GN, weight_GN)
    (total, dw2_WR), (terms, dhidden_GND, dlatent_GNR) = jax.lax.scan(
        row, start, inputs
    )
    return (total, terms), (dhidden_GND, dlatent_GNR, dw2_WR)


def _backward(objective, gradients, cotangents):
    scale = cotangents[0]
    scaled = jax.tree.map(lambda g: (scale * g).astype(g.dtype), gradients)
    return (*scaled, None, None, None, None, None)


vocabulary_terms.defvjp(_forward, _backward)


def head_columns(
    head_WD: Float[Array, "W D"], x_ND: Float[Array, "N D"]
) -> Float[Array, "W N"]:
    """float32 logits of N rows as columns: sums over W are quickest so on CPUs."""
    return _dot(head_WD, x_ND.T, preferred_element_type=jnp.float32)


def _dot(a, b, **options):
    return jnp.dot(a, b, precision=precision(a.dtype), **options)


def _row(objective, logits_WN, log_p_WN, label_N, gradient):
    """Numerators, terms and d numerator / d logits of N rows, see `head_columns`."""
    W = logits_WN.shape[0]
    best_N = jnp.max(logits_WN, axis=0)
    log_sum_N = best_N + jnp.log(jnp.sum(jnp.exp(logits_WN - best_N), axis=0))
    log_q_WN = logits_WN - log_sum_N
    q_WN, p_WN = jnp.exp(log_q_WN), jnp.exp(log_p_WN)
    inside_N = jnp.sum(p_WN, axis=0)
    sign_WN = jnp.sign(q_WN - p_WN)
    # Tokens that cannot be drafted have q = 0 and add their p.
    l1_N = jnp.sum(jnp.abs(q_WN - p_WN), axis=0) + jnp.maximum(1 - inside_N, 0)
    is_label_WN = jnp.arange(W)[:, None] == label_N
    known_N = label_N < W
    ce_N = -jnp.sum(jnp.where(is_label_WN, log_q_WN, 0), axis=0)
    some_N = jnp.maximum(inside_N, 1e-6)
    soft_ce_N = -jnp.sum(p_WN * log_q_WN, axis=0) / some_N
    # Whether the two best tokens are one, without an argmax, which is slow on CPU.
    target_best_N = jnp.max(log_p_WN, axis=0)
    both_best_WN = (log_p_WN == target_best_N) & (logits_WN == best_N)
    terms = VocabularyTerms(
        ce_N=ce_N,
        l1_N=l1_N,
        soft_ce_N=soft_ce_N,
        agree_N=jnp.any(both_best_WN, axis=0),
    )
    numerator_N = objective.ce * ce_N + objective.l1 * l1_N
    numerator_N += objective.soft_ce * soft_ce_N
    if not gradient:
        return numerator_N, terms, None
    d_WN = jnp.zeros_like(q_WN)
    if objective.ce:
        d_WN += objective.ce * jnp.where(known_N, q_WN - is_label_WN, 0)
    if objective.l1:
        mean_N = jnp.sum(q_WN * sign_WN, axis=0)
        d_WN += objective.l1 * q_WN * (sign_WN - mean_N)
    if objective.soft_ce:
        d_WN += objective.soft_ce * (q_WN - p_WN / some_N)
    return numerator_N, terms, d_WN
