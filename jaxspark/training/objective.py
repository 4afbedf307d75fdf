"""The training objective of drafters (arXiv 2607.05147, section 3.1).

    ce * CE(q, token) + l1 * |q - p|_1 + confidence * BCE(c, 1 - |q - p|_1 / 2)

plus, for Eagle3, soft_ce * CE(q, p). Each term is sum(w * term) / sum(w) over the whole
batch; row j of a block has weight w_j = decay^j while it counts. Temperature 1.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

# Bins of forecasts of survival, in which ranking is counted.
FORECAST_BINS = 200


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

    def weights(self, valid_GN: Bool[Array, "G N"]) -> Float[Array, "G N"]:
        """w_j of rows that count, 0 of others."""
        G = valid_GN.shape[0]
        w_G = self.decay ** jnp.arange(G, dtype=jnp.float32)
        return jnp.where(valid_GN, w_G[:, None], 0.0)


DSPARK = Objective()
DFLASH = Objective(ce=1.0, l1=0.0, confidence=0.0)
EAGLE3 = Objective(ce=0.0, l1=0.0, confidence=0.0, soft_ce=1.0, decay=0.8)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VocabularyTerms:
    """Terms of single rows that are sums over the vocabulary.

    Attributes:
      ce_N: cross entropy with the token, nats; 0 if it cannot be drafted.
      l1_N: L1 distance of draft and target.
      soft_ce_N: cross entropy with the target within the draft vocabulary, nats.
      agree_N: whether draft and target have the same most likely token of the draft
        vocabulary.
    """

    ce_N: Float[Array, " N"]
    l1_N: Float[Array, " N"]
    soft_ce_N: Float[Array, " N"]
    agree_N: Bool[Array, " N"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums:
    """Sums over the rows of a batch; batches add up. Only `numerator` has a gradient.

    Attributes:
      numerator: of the loss; divide by `weight`.
      weight: sum of the rows' weights.
      ce: weighted cross entropy with the token, nats.
      l1: weighted L1 distance.
      confidence: weighted cross entropy of the confidence, nats.
      soft_ce: weighted cross entropy with the target, nats.
      bias: weighted confidence minus expected acceptance.
      rows_G: rows that count, by place in the block.
      accept_G: expected acceptances 1 - L1/2, by place.
      agree_G: rows whose most likely token is the target's (within the draft
        vocabulary), by place.
      tokens: sum over blocks of 1 + expected accepted drafts.
      ranked_GF2: expected survivals and failures, by place and by bin of what the
        confidences say of survival.
      rankable_GF2: the same by bin of expected survival itself, which no confidence
        beats.
    """

    numerator: Float[Array, ""]
    weight: Float[Array, ""]
    ce: Float[Array, ""]
    l1: Float[Array, ""]
    confidence: Float[Array, ""]
    soft_ce: Float[Array, ""]
    bias: Float[Array, ""]
    rows_G: Float[Array, " G"]
    accept_G: Float[Array, " G"]
    agree_G: Float[Array, " G"]
    tokens: Float[Array, ""]
    ranked_GF2: Float[Array, "G F 2"]
    rankable_GF2: Float[Array, "G F 2"]


def reduce_terms(
    numerator: Float[Array, ""],
    terms_GN: VocabularyTerms,
    confidence_GN: Float[Array, "G N"],
    valid_GN: Bool[Array, "G N"],
    objective: Objective,
) -> Sums:
    """Adds the confidence's term and sums over blocks (N) and their rows (G).

    Args:
      numerator: weighted sum of the vocabulary's terms.
      terms_GN: those terms.
      confidence_GN: confidence logits.
      valid_GN: rows that count; the others may hold anything.
      objective: weights.
    """
    w_GN = objective.weights(valid_GN)

    def weighted(values_GN):
        return jnp.sum(jnp.where(valid_GN, w_GN * values_GN, 0))

    accept_GN = jax.lax.stop_gradient(jnp.where(valid_GN, 1 - terms_GN.l1_N / 2, 0))
    log_yes_GN = jax.nn.log_sigmoid(confidence_GN)
    log_no_GN = jax.nn.log_sigmoid(-confidence_GN)
    confidence = weighted(-accept_GN * log_yes_GN - (1 - accept_GN) * log_no_GN)
    count_GN = valid_GN.astype(jnp.float32)
    survival_GN = jnp.cumprod(accept_GN, axis=0)
    told_GN = jax.lax.stop_gradient(jnp.cumprod(jnp.exp(log_yes_GN), axis=0))
    return Sums(
        numerator=numerator + objective.confidence * confidence,
        weight=jnp.sum(w_GN),
        ce=weighted(terms_GN.ce_N),
        l1=weighted(terms_GN.l1_N),
        confidence=confidence,
        soft_ce=weighted(terms_GN.soft_ce_N),
        bias=weighted(jax.nn.sigmoid(confidence_GN) - accept_GN),
        rows_G=jnp.sum(count_GN, axis=1),
        accept_G=jnp.sum(accept_GN, axis=1),
        agree_G=jnp.sum(valid_GN & terms_GN.agree_N, axis=1).astype(jnp.float32),
        tokens=jnp.sum(count_GN[0]) + jnp.sum(survival_GN),
        ranked_GF2=_by_forecast(told_GN, survival_GN, valid_GN),
        rankable_GF2=_by_forecast(survival_GN, survival_GN, valid_GN),
    )


def _by_forecast(forecast_GN, survival_GN, valid_GN) -> Float[Array, "G F 2"]:
    """Expected survivals and failures in each bin of a forecast; narrow bins near 0."""
    place_GN = jnp.arange(len(forecast_GN))[:, None]
    root_GN = jnp.sqrt(jnp.clip(forecast_GN, 0, 1))
    bin_GN = jnp.minimum(root_GN * FORECAST_BINS, FORECAST_BINS - 1)
    both_GN2 = jnp.stack([survival_GN, 1 - survival_GN], axis=-1)
    sums_GF2 = jnp.zeros((len(forecast_GN), FORECAST_BINS, 2))
    return sums_GF2.at[place_GN, bin_GN.astype(int)].add(
        jnp.where(valid_GN[..., None], both_GN2, 0)
    )


def expected_auc(by_forecast_GF2: Float[Array, "G F 2"]) -> list[float]:
    """How well forecasts rank, by place: ROC-AUC, expected over what is accepted.

    Acceptance under rejection sampling is a coin even to those who know both
    distributions, so expected survival itself ranks imperfectly. 0.5 where there is
    nothing to rank.
    """
    events_GF, others_GF = np.moveaxis(np.asarray(by_forecast_GF2, np.float64), -1, 0)
    below_GF = np.cumsum(others_GF, axis=1) - others_GF / 2
    pairs_G = events_GF.sum(axis=1) * others_GF.sum(axis=1)
    won_G = (events_GF * below_GF).sum(axis=1)
    return [won / pairs if pairs else 0.5 for won, pairs in zip(won_G, pairs_G)]


def summary(sums: Sums, objective: Objective) -> dict:
    """Figures for a log, from sums on the host.

    `accepted_length` is 1 + sum over k of the product of the first k expected
    acceptances, what sampling at temperature 1 would accept. Rows past the end of an
    answer count as rejected, so it is a little low. `auc` is how well the confidences
    rank blocks by whether they survive to a place, `auc_possible` how well any could.
    """
    weight = max(float(sums.weight), 1e-9)
    rows_G = [max(float(rows), 1.0) for rows in sums.rows_G]
    figures = {
        "loss": float(sums.numerator) / weight,
        "ce": float(sums.ce) / weight,
        "l1": float(sums.l1) / weight,
        "soft_ce": float(sums.soft_ce) / weight,
        "accepted_length": float(sums.tokens) / rows_G[0],
        "accept": [float(a) / n for a, n in zip(sums.accept_G, rows_G)],
        "agree": [float(a) / n for a, n in zip(sums.agree_G, rows_G)],
        "blocks": float(sums.rows_G[0]),
    }
    if objective.confidence:
        figures |= {
            "confidence": float(sums.confidence) / weight,
            "confidence_bias": float(sums.bias) / weight,
            "auc": expected_auc(sums.ranked_GF2),
            "auc_possible": expected_auc(sums.rankable_GF2),
        }
    return figures
