"""How draft and target choices are tied together, and what is emitted.

Row j of a slot's verified rows gives p_j, the target's distribution for the position
after it, of logits as the request wants them (`adjusted_logits`); q_j is the
distribution draft x_{j+1} was drawn from.

rejection (Leviathan et al. 2023, Chen et al. 2023): accept x_{j+1} with probability
    min(1, p_j(x)/q_j(x)); at the first rejection sample normalize(max(p_j - q_j, 0)),
    after the last draft p. The output is distributed as the target's.
gumbel (drafter-invariant coupling, Daliri et al. 2024): position i owns a noise vector
    n(i); the output is argmax(log p + n(i)) whatever was drafted, and the draft is
    argmax(log q + n(i)), so they often agree. The output is the *same tokens* as plain
    sampling with that seed.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxspark.decoding.adjusted_logits import Adjuster
from jaxspark.decoding.grammar_masks import MaskedAdjuster
from jaxspark.decoding.likeliest import Likeliest
from jaxspark.decoding.sampling import (
    Sampling,
    Stream,
    categorical,
    keys,
    position_noise,
    warp,
    warped_at,
)
from jaxspark.decoding.streamed import (
    MOST_ODDS,
    as_streamed,
    needs_logits,
    q_row,
    stream_draft,
    stream_verdict,
)
from jaxspark.decoding.verdicts import (
    Verdict,
    VerifiedRows,
    corrected,
    emitted,
)
from jaxspark.drafters import Drawn, Proposal
from jaxspark.drafters.base import Streamed
from jaxspark.drafters.block_logits import BlockLogits
from jaxspark.models import FlatTokens
from jaxspark.models.layers.linear import head_logits
from jaxspark.parallel import vocabulary
from jaxspark.settings import standard_settings

Coupling = Literal["rejection", "gumbel"]
COUPLINGS = get_args(Coupling)
# What certainty suggests of acceptance before anybody has looked: slope and intercept
# of a logit, by either kind of it (see `Drawn`).
ODDS = (0.5, -0.2)
NEGENTROPY = (0.5, 0.75)


@dataclass(frozen=True)
class CoupledSampler:
    """`DraftSampler` of one round: draws drafts in the way their coupling needs."""

    coupling: Coupling
    sampling: Sampling
    positions_B: Int[Array, " B"]  # of the anchors
    adjuster: Adjuster | MaskedAdjuster | None = None
    streams: bool = False

    def adjusted(
        self,
        logits_BW: Float[Array, "B W"],
        j: Int[Array, ""],
        ids_W: Int[Array, " W"] | None,
    ) -> Float[Array, "B W"]:
        """The logits that draft j of every slot is drawn from."""
        if self.adjuster is None:
            return logits_BW
        return self.adjuster.drafts(logits_BW, j, ids_W)

    def __call__(
        self,
        logits_BW: Float[Array, "B W"],
        j: Int[Array, ""],
        ids_W: Int[Array, " W"] | None,
    ) -> Drawn:
        """Draft j of every slot.

        Where every slot is greedy nobody reads the distribution; it is not computed.
        """
        logits_BW = self.adjusted(logits_BW, j, ids_W)

        def best():
            places_B, odds_B = _best(logits_BW)
            return Drawn(places_B, logits_BW, odds_B)

        drawn = jax.lax.cond(
            jnp.all(self.sampling.greedy),
            best,
            lambda: self._sample(logits_BW, j, ids_W),
        )
        if ids_W is None:
            return drawn
        row_B = jnp.zeros_like(drawn.tokens_B)
        return replace(
            drawn, tokens_B=vocabulary.pick(ids_W[None], row_B, drawn.tokens_B)
        )

    def stream(
        self,
        logits: BlockLogits,
        j: Int[Array, ""],
        latent_BR: Float[Array, "B R"],
        ids_W: Int[Array, " W"] | None,
    ) -> Streamed:
        """Draft j of every slot, from a sequential head; see `streamed`."""

        @jax.named_scope("written_logits")
        def written():
            drawn = self(logits.row(j, latent_BR), j, ids_W)
            return as_streamed(drawn, latent_BR, ids_W)

        def streamed():
            own = self.sampling, self.positions_B
            return stream_draft(self.coupling, logits, j, latent_BR, ids_W, *own)

        assert not isinstance(self.adjuster, MaskedAdjuster)
        needed = needs_logits(self.sampling, self.adjuster)
        return jax.lax.cond(needed, written, streamed)

    def suggested(self, certainty_BG: Float[Array, "B G"]) -> Float[Array, "B G"]:
        """Confidence logits that certainty suggests, for drafters without a head."""
        entropic_B1 = ~self.sampling.greedy[:, None] & (self.coupling == "rejection")
        slope, intercept = (
            jnp.where(entropic_B1, *both) for both in zip(NEGENTROPY, ODDS)
        )
        return slope * certainty_BG + intercept

    def _sample(self, logits_BW, j, ids_W) -> Drawn:
        log_q_BW = warp(logits_BW, self.sampling)
        seed_B, greedy_B = self.sampling.seed, self.sampling.greedy
        positions_B = self.positions_B
        if self.coupling == "rejection":
            # The anchor names the round: a position drafted anew gets new randomness,
            # as it must once earlier confidences decide how much is verified.
            j_B = jnp.full_like(positions_B, j)
            keys_B = keys(Stream.DRAFT, seed_B, positions_B, j_B)
            # The score must not depend on the drafted token: it would decide, through
            # its confidence, whether it is verified (paper, appendix A).
            certainty_B = jnp.where(greedy_B, _best(logits_BW)[1], -entropy(log_q_BW))
            return Drawn(categorical(keys_B, log_q_BW), log_q_BW, certainty_B)
        # The noise belongs to the position that the draft would take.
        if ids_W is None:
            ids_W = vocabulary.places(logits_BW.shape[-1])
        noise_BW = position_noise(seed_B, positions_B + 1 + j, ids_W)
        score_BW = jnp.where(greedy_B[:, None], logits_BW, log_q_BW + noise_BW)
        places_B, odds_B = _best(score_BW)
        return Drawn(places_B, log_q_BW, odds_B)


def _best(score_BW: Float[Array, "B W"]):
    """Place of the best, and the log-odds that softmax gives it, within 10 of 0."""
    best_B = vocabulary.argmax(score_BW)
    is_best_BW = vocabulary.places(score_BW.shape[-1]) == best_B[:, None]
    others_B = vocabulary.logsumexp(jnp.where(is_best_BW, -jnp.inf, score_BW))
    odds_B = vocabulary.maximum(score_BW)[:, 0] - others_B
    return best_B, jnp.clip(odds_B, -MOST_ODDS, MOST_ODDS)


def entropy(log_q_BW: Float[Array, "B W"]) -> Float[Array, " B"]:
    """In nats."""
    # What cannot be drawn contributes nothing, not 0 * inf.
    return -vocabulary.sums(jnp.exp(log_q_BW) * jnp.maximum(log_q_BW, -1e4))


@standard_settings()
def verify(
    coupling: Coupling,
    hidden_TD: Float[Array, "T D"],
    head_VD: Float[Array, "V D"],
    tokens: FlatTokens,
    proposal: Proposal,
    lengths_B: Int[Array, " B"],
    sampling: Sampling,
    *,
    adjuster: Adjuster | MaskedAdjuster | None = None,
    log_probs: bool = False,
    likeliest: Likeliest | None = None,
    streams: bool = False,
) -> Verdict:
    """Accepts a prefix of each slot's `lengths_B` drafts and chooses one more token.

    Args:
      coupling: "rejection" or "gumbel".
      hidden_TD: the target's last hidden states of the verified rows, normed.
      head_VD: its LM head.
      tokens: those rows; slot b has its anchor and `lengths_B[b]` drafts, or none.
      proposal: the drafts and their distributions.
      lengths_B: verification length of each slot.
      sampling: per-slot parameters.
      adjuster: of the logits; None leaves them.
      log_probs: whether to fill `Verdict.log_probs_BQ`.
      likeliest: is given the most likely tokens, which nothing above changes.
      streams: whether logits are not written where no slot needs them, see `streamed`.
    """
    rows = VerifiedRows(tokens.places_BQ, proposal.tokens_BG, lengths_B)

    given = hidden_TD, head_VD, tokens, rows, proposal, sampling

    @jax.named_scope("written_logits")
    def written() -> Verdict:
        return _written_verdict(coupling, *given, adjuster, log_probs, likeliest)

    if not streams:
        return written()
    assert not isinstance(adjuster, MaskedAdjuster)

    def streamed() -> Verdict:
        return replace(stream_verdict(coupling, *given, log_probs), likeliest=likeliest)

    needed = needs_logits(sampling, adjuster, likeliest)
    return jax.lax.cond(needed, written, streamed)


def _written_verdict(
    coupling,
    hidden_TD,
    head_VD,
    tokens,
    rows,
    proposal,
    sampling,
    adjuster,
    log_probs,
    likeliest,
) -> Verdict:
    """From the logits of all rows."""
    model_TV, index_BQ = head_logits(hidden_TD, head_VD), rows.index_BQ
    drafts_BG = proposal.tokens_BG
    logits_TV = model_TV
    if adjuster is not None:
        logits_TV = adjuster.rows(model_TV, tokens, drafts_BG)

    def sample():
        if coupling == "gumbel":
            return _gumbel(logits_TV, tokens, rows, sampling)
        return _rejection(logits_TV, tokens, rows, proposal, sampling, adjuster)

    accepted_B, next_B = jax.lax.cond(
        jnp.all(sampling.greedy),
        lambda: rows.follow(vocabulary.argmax(logits_TV)),
        sample,
    )
    if likeliest is not None:
        row_T = tokens.positions_T - tokens.starts_B[tokens.slots_T]
        kept_T = (tokens.slots_T >= 0) & (row_T <= accepted_B[tokens.slots_T])
        likeliest = likeliest.told(model_TV, tokens, kept_T)
    if not log_probs:
        none_B0 = jnp.zeros((*index_BQ.shape[:1], 0))
        return Verdict(accepted_B, next_B, none_B0, likeliest)
    emitted_BQ = emitted(drafts_BG, accepted_B, next_B)
    shift_T = vocabulary.logsumexp(model_TV)
    row_BQ = jnp.minimum(index_BQ, model_TV.shape[0] - 1)
    chosen_BQ = vocabulary.pick(model_TV, row_BQ, emitted_BQ) - shift_T[row_BQ]
    return Verdict(accepted_B, next_B, chosen_BQ, likeliest)


def _gumbel(logits_TV, tokens, rows, sampling):
    """The target's own choice under each position's noise; drafts must equal it."""
    row_sampling = sampling.at(tokens.slots_T)
    ids_V = vocabulary.places(logits_TV.shape[-1])
    noise_TV = position_noise(row_sampling.seed, tokens.positions_T + 1, ids_V)
    return rows.follow(vocabulary.argmax(warp(logits_TV, row_sampling) + noise_TV))


def _rejection(logits_TV, tokens, rows, proposal, sampling, adjuster):
    """Accepts with probability min(1, p/q), then samples the residual or p itself."""
    B, G = rows.drafts_BG.shape
    anchors_B = tokens.starts_B
    accepted_B = jnp.zeros((B,), jnp.int32)
    if G:
        row_BG = jnp.minimum(rows.index_BQ[:, :-1], len(logits_TV) - 1)
        own = sampling.at(tokens.slots_T)
        log_p_BG = warped_at(logits_TV, own, row_BG, rows.drafts_BG)
        accepted_B = rows.accept_by_chance(log_p_BG, proposal.q, sampling, anchors_B)
    log_p_BV = warp(rows.pick(logits_TV, accepted_B), sampling)
    if not G:
        keys_B = keys(Stream.CORRECT, sampling.seed, anchors_B)
        return accepted_B, categorical(keys_B, log_p_BV)
    width = log_p_BV.shape[-1]
    q_BV = q_row(proposal.q, rows, accepted_B, width, sampling, adjuster)
    rejected_B = accepted_B < rows.lengths_B
    return accepted_B, corrected(log_p_BV, q_BV, rejected_B, sampling, anchors_B)
