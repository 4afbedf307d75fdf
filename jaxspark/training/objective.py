"""The training objective of drafters (arXiv 2607.05147, section 3.1).

    ce * CE(q, token) + l1 * |q - p|_1 + confidence * BCE(c, 1 - |q - p|_1 / 2)

plus, for Eagle3, soft_ce * CE(q, p). Each term is sum(w * term) / sum(w) over the whole
batch; row j of a block has weight w_j = decay^j while it counts. Temperature 1.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Weights of the terms.

    Attributes:
      ce: cross entropy with the token that followed.
      l1: distance of the distributions, twice the chance of a rejection.
      confidence: binary cross entropy of the confidence head.
      soft_ce: cross entropy with the target's distribution over the draft vocabulary.
      decay: weight of a row relative to the row before it.
    """

    ce: float = 0.1
    l1: float = 0.9
    confidence: float = 1.0
    soft_ce: float = 0.0
    decay: float = math.exp(-1 / 4)

    def __post_init__(self):
        weights = (self.ce, self.l1, self.confidence, self.soft_ce)
        if min(weights) < 0 or not any((self.ce, self.l1, self.soft_ce)):
            raise ValueError(
                "weights of the objective must not be negative, and one of ce, l1 and "
                f"soft_ce must be positive, got {self}"
            )
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must lie in (0, 1], got {self.decay}")

    def total(self, sums: "Sums") -> Float[Array, ""]:
        """The numerator of the loss; divide by `sums.weight`."""
        return (
            self.ce * sums.ce
            + self.l1 * sums.l1
            + self.confidence * sums.confidence
            + self.soft_ce * sums.soft_ce
        )


DSPARK = Objective()
DFLASH = Objective(ce=1.0, l1=0.0, confidence=0.0)
EAGLE3 = Objective(ce=0.0, l1=0.0, confidence=0.0, soft_ce=1.0, decay=0.8)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums:
    """Weighted sums over the rows of a batch; batches add up.

    Attributes:
      weight: sum of the rows' weights.
      ce: cross entropy with the token, nats.
      l1: L1 distance of draft and target.
      confidence: cross entropy of the confidence, nats.
      soft_ce: cross entropy with the target, nats.
      rows_G: rows that count, by place in the block.
      accept_G: expected acceptances 1 - L1/2, by place.
      agree_G: rows whose most likely token is the target's, by place.
      tokens: sum over blocks of 1 + expected accepted drafts.
      blocks: blocks with at least one row.
      bias: weighted sum of confidence minus expected acceptance.
    """

    weight: Float[Array, ""]
    ce: Float[Array, ""]
    l1: Float[Array, ""]
    confidence: Float[Array, ""]
    soft_ce: Float[Array, ""]
    rows_G: Float[Array, " G"]
    accept_G: Float[Array, " G"]
    agree_G: Float[Array, " G"]
    tokens: Float[Array, ""]
    blocks: Float[Array, ""]
    bias: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowTerms:
    """Terms of single rows, see `row_terms`."""

    ce_N: Float[Array, " N"]
    l1_N: Float[Array, " N"]
    confidence_N: Float[Array, " N"]
    soft_ce_N: Float[Array, " N"]
    agree_N: Bool[Array, " N"]
    bias_N: Float[Array, " N"]


def row_terms(
    logits_NW: Float[Array, "N W"],
    confidence_N: Float[Array, " N"],
    log_p_NW: Float[Array, "N W"],
    label_N: Int[Array, " N"],
) -> RowTerms:
    """All terms of N rows.

    Args:
      logits_NW: draft logits over the draft vocabulary.
      confidence_N: confidence logits.
      log_p_NW: the target's log-probabilities of the draft vocabulary, which need not
        sum to one.
      label_N: place of the next token in the draft vocabulary, W if it is not there;
        such a row has no cross entropy.
    """
    W = logits_NW.shape[-1]
    log_q_NW = jax.nn.log_softmax(logits_NW)
    p_NW = jnp.exp(log_p_NW)
    inside_N = jnp.sum(p_NW, axis=-1)
    # Tokens that cannot be drafted have q = 0 and add their p.
    l1_N = jnp.sum(jnp.abs(jnp.exp(log_q_NW) - p_NW), axis=-1)
    l1_N += jnp.maximum(1 - inside_N, 0)
    place_N1 = jnp.minimum(label_N, W - 1)[:, None]
    ce_N = -jnp.take_along_axis(log_q_NW, place_N1, axis=-1)[:, 0]
    accept_N = jax.lax.stop_gradient(1 - l1_N / 2)
    log_yes_N = jax.nn.log_sigmoid(confidence_N)
    log_no_N = jax.nn.log_sigmoid(-confidence_N)
    return RowTerms(
        ce_N=jnp.where(label_N < W, ce_N, 0),
        l1_N=l1_N,
        confidence_N=-accept_N * log_yes_N - (1 - accept_N) * log_no_N,
        soft_ce_N=-jnp.sum(p_NW * log_q_NW, axis=-1) / jnp.maximum(inside_N, 1e-6),
        agree_N=jnp.argmax(logits_NW, -1) == jnp.argmax(log_p_NW, -1),
        bias_N=jax.nn.sigmoid(confidence_N) - accept_N,
    )


def reduce_terms(
    terms_GN: RowTerms, valid_GN: Bool[Array, "G N"], objective: Objective
) -> Sums:
    """Sums over blocks (N) and their rows (G)."""
    G = valid_GN.shape[0]
    count_GN = valid_GN.astype(jnp.float32)
    w_GN = count_GN * (objective.decay ** jnp.arange(G, dtype=jnp.float32))[:, None]

    def weighted(values_GN):
        # `where`, not a product: rows that do not count may be anything.
        return jnp.sum(jnp.where(valid_GN, w_GN * values_GN, 0))

    accept_GN = jnp.where(valid_GN, 1 - terms_GN.l1_N / 2, 0)
    agree_GN = valid_GN & terms_GN.agree_N
    return Sums(
        weight=jnp.sum(w_GN),
        ce=weighted(terms_GN.ce_N),
        l1=weighted(terms_GN.l1_N),
        confidence=weighted(terms_GN.confidence_N),
        soft_ce=weighted(terms_GN.soft_ce_N),
        rows_G=jnp.sum(count_GN, axis=1),
        accept_G=jnp.sum(accept_GN, axis=1),
        agree_G=jnp.sum(agree_GN, axis=1).astype(jnp.float32),
        tokens=jnp.sum(count_GN[0]) + jnp.sum(jnp.cumprod(accept_GN, axis=0)),
        blocks=jnp.sum(count_GN[0]),
        bias=weighted(terms_GN.bias_N),
    )


def summary(sums: Sums, objective: Objective) -> dict:
    """Figures for a log, from sums on the host.

    `accepted_length` is 1 + sum over k of the product of the first k expected
    acceptances: what sampling at temperature 1 would accept, could blocks end nowhere.
    """
    weight = max(float(sums.weight), 1e-9)
    rows_G = [max(float(rows), 1.0) for rows in sums.rows_G]
    figures = {
        "loss": float(objective.total(sums)) / weight,
        "ce": float(sums.ce) / weight,
        "l1": float(sums.l1) / weight,
        "soft_ce": float(sums.soft_ce) / weight,
        "accepted_length": float(sums.tokens) / max(float(sums.blocks), 1.0),
        "accept": [float(a) / n for a, n in zip(sums.accept_G, rows_G)],
        "agree": [float(a) / n for a, n in zip(sums.agree_G, rows_G)],
        "blocks": float(sums.blocks),
    }
    if objective.confidence:
        figures |= {
            "confidence": float(sums.confidence) / weight,
            "confidence_bias": float(sums.bias) / weight,
        }
    return figures
