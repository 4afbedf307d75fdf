"""What a round's drafts are believed to be worth, and what is learned of it afterwards.

The drafter's confidence goes through the calibration, if there is one, and then through
what the estimator has learned, if there is one.
"""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxspark.decoding.options import DecodeOptions
from jaxspark.decoding.state import DecodeState
from jaxspark.drafters import Proposal


def acceptance_logits(
    state: DecodeState, proposal: Proposal, options: DecodeOptions
) -> Float[Array, "B G"]:
    """Of P(draft j accepted | all before it accepted)."""
    logits_BG = _calibrated(state, proposal, options)
    if options.estimator is None or state.estimator is None:
        return logits_BG
    return state.estimator.logits(
        logits_BG, proposal.certainty_BG, ~state.sampling.greedy
    )


def observe(
    state: DecodeState,
    proposal: Proposal,
    lengths_B: Int[Array, " B"],
    accepted_B: Int[Array, " B"],
    options: DecodeOptions,
) -> DecodeState:
    """Learns from what became of the drafts that were verified, where that is wanted.

    After the round was scheduled, never before: see `estimator`.

    Args:
      state: the slots, not committed yet.
      proposal: the drafts.
      lengths_B: drafts verified.
      accepted_B: drafts accepted.
      options: whose estimator learns.
    """
    nothing = not proposal.tokens_BG.shape[1]
    if options.estimator is None or state.estimator is None or nothing:
        return state
    judged_B = jnp.where(state.live_B, jnp.minimum(accepted_B + 1, lengths_B), 0)
    estimator = state.estimator.observed(
        options.estimator,
        confidence_BG=_calibrated(state, proposal, options),
        certainty_BG=proposal.certainty_BG,
        sampled_B=~state.sampling.greedy,
        judged_B=judged_B,
        accepted_B=jnp.minimum(accepted_B, judged_B),
    )
    return replace(state, estimator=estimator)


def check_estimator(state: DecodeState, options: DecodeOptions) -> None:
    """Raises `ValueError` if the state has no room for what the options learn."""
    if options.estimator is not None and state.estimator is None:
        raise ValueError(
            "options have an estimator, the state was made without; give it to "
            "DecodeState.empty or init_state too"
        )


def _calibrated(
    state: DecodeState, proposal: Proposal, options: DecodeOptions
) -> Float[Array, "B G"]:
    """Confidences as the calibration has them."""
    if options.calibration is None:
        return proposal.confidence_BG
    return options.calibration.logits(
        proposal.confidence_BG, proposal.certainty_BG, state.sampling.temperature
    )
