"""What verification decides, and how: rows, acceptance, the token behind them."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxspark.decoding.likeliest import Likeliest
from jaxspark.decoding.sampling import Sampling, Stream, categorical, keys
from jaxspark.drafters import DraftDistribution
from jaxspark.drafters.block_logits import BlockDistribution
from jaxspark.parallel import vocabulary


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Verdict:
    """What verification decided, per slot.

    Attributes:
      accepted_B: drafts accepted.
      next_B: the token after them, chosen by the target.
      log_probs_BQ: model log-probabilities (before adjustments and any warp) of the
        accepted drafts and of the next token; rows past it are unspecified. Empty
        unless asked for.
      likeliest: with the most likely tokens beside them; None unless asked for.
    """

    accepted_B: Int[Array, " B"]
    next_B: Int[Array, " B"]
    log_probs_BQ: Float[Array, "B Q"]
    likeliest: Likeliest | None = None


def emitted(
    drafts_BG: Int[Array, "B G"], accepted_B: Int[Array, " B"], next_B: Int[Array, " B"]
) -> Int[Array, "B Q"]:
    """Accepted drafts followed by the next token; later entries repeat it."""
    padded_BQ = jnp.pad(drafts_BG, ((0, 0), (0, 1)))
    is_draft_BQ = jnp.arange(padded_BQ.shape[1]) < accepted_B[:, None]
    return jnp.where(is_draft_BQ, padded_BQ, next_B[:, None])


@dataclass(frozen=True)
class VerifiedRows:
    """Addresses of a round's verified rows."""

    index_BQ: Int[Array, "B Q"]
    drafts_BG: Int[Array, "B G"]
    lengths_B: Int[Array, " B"]

    def drafted(self) -> Bool[Array, "B G"]:
        """Which drafts were verified."""
        return jnp.arange(self.drafts_BG.shape[1]) < self.lengths_B[:, None]

    def accept(self, agree_BG: Bool[Array, "B G"]) -> Int[Array, " B"]:
        """Length of the prefix of verified drafts that agree."""
        return jnp.sum(jnp.cumprod(agree_BG & self.drafted(), axis=1), axis=1)

    def accept_by_chance(
        self,
        log_p_BG: Float[Array, "B G"],
        q: DraftDistribution | BlockDistribution,
        sampling: Sampling,
        anchors_B: Int[Array, " B"],
    ) -> Int[Array, " B"]:
        """Length of the prefix that min(1, p/q) accepts."""
        G = self.drafts_BG.shape[1]
        chance_BG = acceptance_probability(log_p_BG, q.log_prob(self.drafts_BG))
        keys_B = keys(Stream.ACCEPT, sampling.seed, anchors_B)
        draw_BG = jax.vmap(lambda key: jax.random.uniform(key, (G,)))(keys_B)
        return self.accept(draw_BG < chance_BG)

    def pick(self, x_T: Array, row_B: Int[Array, " B"]) -> Array:
        """Entry of each slot's row `row_B` (padding reads the last entry)."""
        place_B = jnp.take_along_axis(self.index_BQ, row_B[:, None], axis=1)[:, 0]
        return x_T[jnp.minimum(place_B, x_T.shape[0] - 1)]

    def follow(self, choice_T: Int[Array, " T"]):
        """Accepts drafts while they equal the target's own choice of each row."""
        last = choice_T.shape[0] - 1
        choice_BQ = choice_T[jnp.minimum(self.index_BQ, last)]
        accepted_B = self.accept(choice_BQ[:, :-1] == self.drafts_BG)
        return accepted_B, self.pick(choice_T, accepted_B)


def acceptance_probability(
    log_p_BG: Float[Array, "B G"], log_q_BG: Float[Array, "B G"]
) -> Float[Array, "B G"]:
    """min(1, p/q) of drafts that were drawn from q, given their log-probabilities."""
    return jnp.minimum(1.0, jnp.exp(log_p_BG - log_q_BG))


def correction_weights(
    p_BV: Float[Array, "B V"], q_BV: Float[Array, "B V"], rejected_B: Bool[Array, " B"]
) -> Float[Array, "B V"]:
    """What the next token is drawn from, up to a factor: max(p - q, 0), or p itself."""
    residual_BV = jnp.maximum(p_BV - q_BV, 0.0)
    # Rounding may leave nothing of a residual that is tiny but was hit.
    some_B = vocabulary.sums(residual_BV) > 0
    return jnp.where((rejected_B & some_B)[:, None], residual_BV, p_BV)


def corrected(
    log_p_BV: Float[Array, "B V"],
    q_BV: Float[Array, "B V"],
    rejected_B: Bool[Array, " B"],
    sampling: Sampling,
    anchors_B: Int[Array, " B"],
) -> Int[Array, " B"]:
    """The token behind the accepted drafts, under rejection sampling."""
    weights_BV = correction_weights(jnp.exp(log_p_BV), q_BV, rejected_B)
    keys_B = keys(Stream.CORRECT, sampling.seed, anchors_B)
    return categorical(keys_B, jnp.log(weights_BV))
