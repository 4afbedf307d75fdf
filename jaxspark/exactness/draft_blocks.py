"""Every draft block that can be drawn after a prompt, with its probability.

The drafter proposes each as it would if those tokens were drawn, and the target
verifies them; both are the decoder's own functions.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxspark.decoding import init_state
from jaxspark.decoding.couplings import CoupledSampler
from jaxspark.decoding.round import adjuster_for
from jaxspark.decoding.sampling import Sampling, warp
from jaxspark.decoding.state import DecodeState
from jaxspark.drafters import DraftContext, Drawn, Proposal
from jaxspark.exactness.wanted import Wanted
from jaxspark.models import FlatTokens


@dataclass(frozen=True)
class ForcedSampler:
    """Draws the tokens it is told to; what it says of them is the decoder's."""

    decoder: CoupledSampler
    forced_G: Int[Array, " G"]
    streams: bool = False

    def __call__(self, logits_BW, j, ids_W) -> Drawn:
        """The j-th of them."""
        return Drawn(
            tokens_B=self.forced_G[j][None],
            log_q_BW=warp(
                self.decoder.adjusted(logits_BW, j, ids_W), self.decoder.sampling
            ),
            certainty_B=self.decoder(logits_BW, j, ids_W).certainty_B,
        )

    def stream(self, logits, j, latent_BR, ids_W):
        """It does not."""
        raise NotImplementedError

    def suggested(self, certainty_BG):
        """What the decoder's suggests."""
        return self.decoder.suggested(certainty_BG)


@dataclass(frozen=True)
class Block:
    """A draft block that can be drawn.

    Attributes:
      drafts: its tokens.
      proposal: the drafts with what they were drawn from.
      log_p_QV: the decoder's log p behind the anchor and each draft.
    """

    drafts: tuple[int, ...]
    proposal: Proposal
    log_p_QV: np.ndarray

    @property
    def chance(self) -> float:
        """How likely these drafts are."""
        return _draft_probability(self.proposal)


def draft_blocks(
    target,
    drafter,
    prompt: Sequence[int],
    block_length: int,
    sampling: Sampling,
    wanted: Wanted = Wanted(),
) -> Iterator[Block]:
    """Each draft block that can be drawn after a prompt."""
    vocab = target.config.vocab_size
    state = init_state(
        target,
        drafter,
        [prompt],
        [len(prompt) + block_length + 1],
        sampling,
        block_length=block_length,
        stop_ids=[wanted.stop_ids],
    )
    state = replace(state.rewind(state.lengths_B), adjustments=wanted.of(prompt, vocab))
    if len(prompt) > 1:
        tokens = FlatTokens.from_rows(
            jnp.array([prompt[:-1]], jnp.int32),
            jnp.zeros((1,), jnp.int32),
            jnp.array([len(prompt) - 1]),
        )
        state = _observed(target, drafter, tokens, state)
    seen, masked = set(), wanted.grammar is not None
    masks_1QU = wanted.masks_along(prompt, ()) if masked else None
    for drafts in itertools.product(range(vocab), repeat=block_length):
        forced_G = jnp.array(drafts, jnp.int32)
        proposal = _proposed(target, drafter, state, forced_G, masks_1QU)
        drafts = tuple(np.asarray(proposal.tokens_BG)[0].tolist())
        # A drafter that does not sample proposes the same block whatever is forced.
        if drafts not in seen and _draft_probability(proposal) > 0:
            seen.add(drafts)
            log_p_QV = _verified_rows(
                target,
                replace(state, draft_cache=()),
                proposal.tokens_BG,
                wanted.masks_along(prompt, drafts) if masked else None,
            )
            yield Block(drafts, proposal, np.asarray(log_p_QV, np.float64))


@jax.jit
def _observed(target, drafter, tokens: FlatTokens, state: DecodeState) -> DecodeState:
    """The state with the caches of tokens of a prompt."""
    _, taps_TmD, target_cache = target(tokens, state.target_cache, taps=drafter.taps)
    draft_cache = drafter.observe(state.draft_cache, taps_TmD, tokens)
    return replace(state, target_cache=target_cache, draft_cache=draft_cache)


@jax.jit
def _proposed(
    target, drafter, state: DecodeState, forced_G, masks_BQU=None
) -> Proposal:
    """The proposal if these drafts are drawn."""
    context = DraftContext.of(state.tokens_BS, state.lengths_B)
    decoder = CoupledSampler(
        "rejection",
        state.sampling,
        context.positions_B,
        adjuster_for(state, masks_BQU),
    )
    sampler = ForcedSampler(decoder, forced_G)
    return drafter.propose(target, state.draft_cache, context, sampler, len(forced_G))[
        0
    ]


@jax.jit
def _verified_rows(
    target, state: DecodeState, drafts_BG, masks_BQU=None
) -> Float[Array, "Q V"]:
    """log p behind the anchor and each draft, as a round verifies them."""
    anchors_B = state.processed_B
    anchor_B1 = jnp.take_along_axis(state.tokens_BS, anchors_B[:, None], axis=1)
    rows_BQ = jnp.concatenate([anchor_B1, drafts_BG], axis=1)
    counts_B = jnp.full_like(anchors_B, rows_BQ.shape[1])
    tokens = FlatTokens.from_rows(rows_BQ, anchors_B, counts_B)
    x_TD, _, _ = target(tokens, state.target_cache)
    logits_TV, adjuster = target.logits(x_TD), adjuster_for(state, masks_BQU)
    if adjuster is not None:
        logits_TV = adjuster.rows(logits_TV, tokens, drafts_BG)
    return warp(logits_TV, state.sampling.at(tokens.slots_T))


def _draft_probability(proposal) -> float:
    return float(np.exp(np.sum(_log_q(proposal))))


def _log_q(proposal) -> np.ndarray:
    return np.asarray(proposal.q.log_prob(proposal.tokens_BG), np.float64)
