"""Drafts and verdicts from a vocabulary that is passed over, not written.

On TPUs, where `pallas_kernels` has `draft_sampling` and `verify`: neither the [T, V]
logits of verified rows nor the [B, G, V] distributions of drafts are arrays. Tokens are
those of `couplings` up to rounding.

gumbel: a row's output is the drawn token of `verify`. rejection: `verify` has the
probability of each draft; behind the last accepted one, the residual is of one row per
slot, [B, V], whose logits are computed again.

Filters (top-k and so on), adjustments and likely tokens look at all logits, several
times. A round in which a slot asks for one takes the way of `couplings`, in a branch.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxspark.decoding.adjusted_logits import Adjuster
from jaxspark.decoding.grammar_masks import MaskedAdjuster
from jaxspark.decoding.likeliest import Likeliest
from jaxspark.decoding.sampling import Sampling, Stream, key_words, keys, or_best, warp
from jaxspark.decoding.verdicts import Verdict, VerifiedRows, corrected
from jaxspark.drafters import DraftDistribution, Drawn, Proposal
from jaxspark.drafters.base import Streamed
from jaxspark.drafters.block_logits import BlockDistribution, BlockLogits
from jaxspark.models import FlatTokens
from jaxspark.models.layers.linear import head_logits
from jaxspark.parallel import vocabulary
from pallas_kernels import Draws, Rows, draft_sampling, verify
from pallas_kernels.dispatch import expected_platform
from pallas_kernels.ragged import LANES

# The log-odds of a draft are told within these bounds.
MOST_ODDS = 10.0


def streams_vocabulary(width: int) -> bool:
    """Whether programs being made pass over vocabularies instead of writing logits.

    CPUs and GPUs have no kernels for it, nor have TPUs for targets whose hidden states
    do not fill their lanes; what XLA does for them stays.
    """
    return expected_platform() == "tpu" and width % LANES == 0


def needs_logits(
    sampling: Sampling, adjuster: Adjuster | None, likeliest: Likeliest | None = None
) -> Bool[Array, ""]:
    """Whether a slot asks for what needs all logits at once."""
    needed = jnp.any(sampling.filtered)
    if adjuster is not None:
        needed |= adjuster.any_asks
    if likeliest is not None:
        needed |= jnp.any(likeliest.wanted_B > 0)
    return needed


def stream_draft(
    coupling: str,
    logits: BlockLogits,
    j: Int[Array, ""],
    latent_BR: Float[Array, "B R"],
    ids_W: Int[Array, " W"] | None,
    sampling: Sampling,
    positions_B: Int[Array, " B"],
) -> Streamed:
    """Draft j of every slot, as `CoupledSampler` draws it without filters."""
    rejection = coupling == "rejection"
    if rejection:
        j_B = jnp.full_like(positions_B, j)
        keys_B = keys(Stream.DRAFT, sampling.seed, positions_B, j_B)
    else:
        keys_B = keys(Stream.NOISE, sampling.seed, positions_B + 1 + j)
    rows = _rows(sampling, keys_B)
    first = vocabulary.first(logits.base_GBW.shape[2])

    def drawn(rows: Rows) -> Draws:
        return draft_sampling(
            *(logits.base_GBW, j, latent_BR, logits.weight_WR, rows),
            first=first,
            # Noise of the target's positions goes by its ids.
            ids_W=None if rejection else ids_W,
        )

    draws = _noise_if_sampled(drawn, rows, sampling.greedy)
    draws = vocabulary.united(draws, rows, first)
    odds_B = jnp.clip(draws.odds(rows.rate_R), -MOST_ODDS, MOST_ODDS)
    certainty_B = odds_B
    if rejection:
        certainty_B = jnp.where(sampling.greedy, odds_B, -draws.entropy())
    log_q_B = draws.log_prob(draws.logit_R, rows.rate_R)
    tokens_B = draws.place_R
    if ids_W is not None:
        tokens_B = vocabulary.pick(ids_W[None], jnp.zeros_like(tokens_B), tokens_B)
    return Streamed(
        tokens_B=tokens_B,
        certainty_B=certainty_B,
        log_q_B=jnp.where(sampling.greedy, 0.0, log_q_B),
        latent_BR=latent_BR,
    )


def as_streamed(
    drawn: Drawn, latent_BR: Float[Array, "B R"], ids_W: Int[Array, " W"] | None
) -> Streamed:
    """A draft that was drawn from written logits."""
    q = DraftDistribution(drawn.log_q_BW[:, None], ids_W)
    log_q_B = q.log_prob(drawn.tokens_B[:, None])[:, 0]
    return Streamed(drawn.tokens_B, drawn.certainty_B, log_q_B, latent_BR)


def stream_verdict(
    coupling: str,
    hidden_TD: Float[Array, "T D"],
    head_VD: Float[Array, "V D"],
    tokens: FlatTokens,
    rows: VerifiedRows,
    proposal: Proposal,
    sampling: Sampling,
    log_probs: bool,
) -> Verdict:
    """What `couplings.verify` decides, where no slot needs logits."""
    own = sampling.at(tokens.slots_T)
    first, drafts_BG = vocabulary.first(len(head_VD)), rows.drafts_BG
    B, G = drafts_BG.shape
    keys_T, named_T = None, None
    if coupling == "gumbel":
        keys_T = keys(Stream.NOISE, own.seed, tokens.positions_T + 1)
    elif G:
        row_T = tokens.positions_T - tokens.starts_B[tokens.slots_T]
        named_T = drafts_BG.at[tokens.slots_T, row_T].get(mode="clip")
    drawn_as = _rows(own, keys_T)

    def drawn(drawn_as: Rows) -> Draws:
        return verify(hidden_TD, head_VD, drawn_as, named_T=named_T, first=first)

    draws = _noise_if_sampled(drawn, drawn_as, own.greedy)
    draws = vocabulary.united(draws, drawn_as, first)
    model_T = draws.model_log_prob(draws.logit_R)
    index_BQ = jnp.minimum(rows.index_BQ, len(hidden_TD) - 1)

    def follow():
        accepted_B, next_B = rows.follow(draws.place_R)
        return accepted_B, next_B, model_T[index_BQ]

    def by_chance():
        anchors_B = tokens.starts_B
        accepted_B = jnp.zeros((B,), jnp.int32)
        if G:
            log_p_T = draws.log_prob(draws.named_R, drawn_as.rate_R)
            log_p_T = or_best(log_p_T, draws.place_R == named_T, own.greedy)
            log_p_BG = log_p_T[index_BQ[:, :-1]]
            accepted_B = rows.accept_by_chance(
                log_p_BG, proposal.q, sampling, anchors_B
            )
        model_BV = head_logits(rows.pick(hidden_TD, accepted_B), head_VD)
        log_p_BV = warp(model_BV, sampling)
        width = log_p_BV.shape[1]
        q_BV = jnp.zeros_like(log_p_BV)
        if G:
            q_BV = q_row(proposal.q, rows, accepted_B, width, sampling)
        rejected_B = accepted_B < rows.lengths_B
        next_B = corrected(log_p_BV, q_BV, rejected_B, sampling, anchors_B)
        # Rows before the last hold what was accepted, the last what was drawn.
        named_BQ = draws.model_log_prob(draws.named_R)[index_BQ]
        next_log_p_B = vocabulary.pick(model_BV, jnp.arange(B), next_B)
        next_log_p_B -= vocabulary.logsumexp(model_BV)
        is_draft_BQ = jnp.arange(G + 1) < accepted_B[:, None]
        return (
            accepted_B,
            next_B,
            jnp.where(is_draft_BQ, named_BQ, next_log_p_B[:, None]),
        )

    if coupling == "gumbel":
        accepted_B, next_B, told_BQ = follow()
    else:
        accepted_B, next_B, told_BQ = jax.lax.cond(
            jnp.all(sampling.greedy), follow, by_chance
        )
    return Verdict(accepted_B, next_B, told_BQ if log_probs else told_BQ[:, :0])


def q_row(
    q: DraftDistribution | BlockDistribution,
    rows: VerifiedRows,
    row_B: Int[Array, " B"],
    vocab: int,
    sampling: Sampling,
    adjuster: Adjuster | MaskedAdjuster | None = None,
) -> Float[Array, "B V"]:
    """q of one draft of each slot over the target's vocabulary, this shard's part."""
    if isinstance(q, DraftDistribution):
        return q.row(rows.drafts_BG, row_B, vocab)
    row_B = jnp.minimum(row_B, rows.drafts_BG.shape[1] - 1)
    logits_BW = q.logits_of(row_B)
    if adjuster is not None:
        logits_BW = adjuster.drafts(logits_BW, row_B, q.ids_W)
    return q.over_target(jnp.exp(warp(logits_BW, sampling)), vocab)


def _rows(sampling: Sampling, keys_R: Any = None) -> Rows:
    """How rows are drawn, with the noise of keys."""
    keys_R2 = None if keys_R is None else key_words(keys_R)
    return Rows(sampling.temperature, keys_R2)


def _noise_if_sampled(drawn, rows: Rows, greedy_R) -> Draws:
    """No noise is made where every row is greedy."""
    if rows.keys_R2 is None:
        return drawn(rows)
    return jax.lax.cond(
        jnp.all(greedy_R),
        lambda: drawn(rows._replace(keys_R2=None)),
        lambda: drawn(rows),
    )
