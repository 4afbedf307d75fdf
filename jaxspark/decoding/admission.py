"""Requests, checked and laid out as a state takes them up."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxspark.decoding.adjustment_arrays import Adjustments
from jaxspark.decoding.adjustments import Adjustment, AdjustmentLimits
from jaxspark.decoding.likeliest import Likeliest
from jaxspark.decoding.sampling import Sampling
from jaxspark.decoding.state import DecodeState
from jaxspark.settings import standard_settings


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Admission:
    """N requests, checked and ready to be written into slots.

    Attributes:
      tokens_NP: prompts, zeros past their lengths.
      lengths_N: of the prompts.
      limits_N: total length (prompt and output) at which each finishes.
      stop_ids_NX: tokens that end each, padded with -1.
      sampling: parameters of each.
      min_drafts_N: drafts verified in every round that drafts.
      max_drafts_N: most drafts that are.
      adjustments: what they do to their logits; None where the state has no room.
      top_log_probs_N: most likely tokens told beside each output token.
      prompt_log_probs_N: whether log-probabilities of the prompt are told.
      processed_N: first tokens of each whose cache rows are there already.
    """

    tokens_NP: Int[Array, "N P"]
    lengths_N: Int[Array, " N"]
    limits_N: Int[Array, " N"]
    stop_ids_NX: Int[Array, "N X"]
    sampling: Sampling
    min_drafts_N: Int[Array, " N"]
    max_drafts_N: Int[Array, " N"]
    adjustments: Adjustments | None
    top_log_probs_N: Int[Array, " N"]
    prompt_log_probs_N: Bool[Array, " N"]
    processed_N: Int[Array, " N"]

    @classmethod
    @standard_settings()
    def of(
        cls,
        state: DecodeState,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        sampling: Sampling,
        *,
        stop_ids: Sequence[Sequence[int]] | None = None,
        min_drafts: int | Sequence[int] = 0,
        max_drafts: int | Sequence[int] | None = None,
        adjustments: Sequence[Adjustment] | None = None,
        prompt_lengths: Sequence[int] | None = None,
        top_log_probs: Sequence[int] | None = None,
        prompt_log_probs: Sequence[bool] | None = None,
        processed: Sequence[int] | None = None,
    ) -> "Admission":
        """Requests for slots of `state`, of which only shapes are looked at.

        Args:
          state: that they will be admitted to.
          prompts: token ids, at least one each.
          limits: total length at which each finishes.
          sampling: parameters of `len(prompts)` requests.
          stop_ids: per request, tokens that end it; None for none.
          min_drafts: drafts verified in every round that drafts, for all or for each.
          max_drafts: most drafts verified in a round; None for all.
          adjustments: per request, what is done to its logits; None for nothing.
          prompt_lengths: per request, tokens of `prompts` that no penalty or least
            length takes for output; None for all of them. Fewer for one that goes on.
          top_log_probs: per request, likely tokens told at each place; None for none.
          prompt_log_probs: per request, whether the prompt's are told; None for no.
          processed: first tokens of each prompt whose cache rows are there already, all
            but one at most; None for none.

        Raises:
          ValueError: numbers that are not whole, an empty prompt, one that its limit or
            the capacity cannot hold, more stop ids or adjustments than the state has
            room for, bounds on drafts that contradict each other or the block length,
            or not one of everything per prompt.
        """
        count = len(prompts)
        stop_ids = [()] * count if stop_ids is None else stop_ids
        adjustments = [Adjustment()] * count if adjustments is None else adjustments
        if prompt_lengths is None:
            prompt_lengths = [len(prompt) for prompt in prompts]
        top = [0] * count if top_log_probs is None else top_log_probs
        told = [False] * count if prompt_log_probs is None else prompt_log_probs
        processed = [0] * count if processed is None else processed
        counts = {
            "limits": len(limits),
            "sampling": len(sampling.seed),
            "stop_ids": len(stop_ids),
            "adjustments": len(adjustments),
            "prompt_lengths": len(prompt_lengths),
            "top_log_probs": len(top),
            "prompt_log_probs": len(told),
            "processed": len(processed),
        }
        for name, given in counts.items():
            if not count or given != count:
                raise ValueError(
                    f"{count} prompts, but {name} for {given}; give one each"
                )
        limits_N, block = whole_numbers("limits", limits), state.block_length
        if limits_N.max() + block > state.capacity:
            raise ValueError(
                f"a capacity of {state.capacity} positions cannot hold "
                f"{limits_N.max()} tokens and a block of {block}; it must be at least "
                f"{limits_N.max() + block}"
            )
        width = state.stop_ids_BX.shape[1]
        tokens_NP = np.zeros((count, state.capacity), np.int32)
        stop_ids_NX = np.full((count, width), -1, np.int32)
        for row, (prompt, limit, stops) in enumerate(zip(prompts, limits, stop_ids)):
            if not len(prompt):
                raise ValueError(f"prompt {row} is empty; give at least one token")
            if len(prompt) > limit:
                raise ValueError(
                    f"prompt {row} has {len(prompt)} tokens, more than its limit "
                    f"{limit}"
                )
            if not 0 <= processed[row] < len(prompt):
                raise ValueError(
                    f"{processed[row]} of the {len(prompt)} tokens of prompt {row} are "
                    f"said to be processed; expected 0 to {len(prompt) - 1}"
                )
            if len(stops) > width:
                raise ValueError(
                    f"{len(stops)} stop ids for prompt {row}, the state has room for "
                    f"{width}"
                )
            tokens_NP[row, : len(prompt)] = whole_numbers(f"prompt {row}", prompt)
            stop_ids_NX[row, : len(stops)] = whole_numbers("stop_ids", stops)
        least_N, most_N = _draft_bounds(count, min_drafts, max_drafts, block)
        _check_told(state.likeliest, top, told)
        return cls(
            tokens_NP=jnp.asarray(tokens_NP),
            lengths_N=jnp.array([len(prompt) for prompt in prompts], jnp.int32),
            limits_N=jnp.asarray(limits_N.astype(np.int32)),
            stop_ids_NX=jnp.asarray(stop_ids_NX),
            # The state that takes them over is donated; the caller keeps its own.
            sampling=jax.tree.map(jnp.array, sampling),
            min_drafts_N=jnp.asarray(least_N),
            max_drafts_N=jnp.asarray(most_N),
            adjustments=_adjusting(state.adjustments, adjustments, prompt_lengths),
            top_log_probs_N=jnp.array(top, jnp.int32),
            prompt_log_probs_N=jnp.array(told, bool),
            processed_N=jnp.asarray(np.asarray(processed, np.int32)),
        )


def _adjusting(
    room: Adjustments | None,
    adjustments: Sequence[Adjustment],
    prompt_lengths: Sequence[int],
) -> Adjustments | None:
    """Arrays of adjustments as a state with this room takes them up."""
    if room is None:
        for each in adjustments:
            AdjustmentLimits().check(each)
        return None
    return Adjustments.of(
        adjustments, room.limits, vocab=room.vocab, prompt_lengths=prompt_lengths
    )


def _check_told(
    room: Likeliest | None, top: Sequence[int], prompts: Sequence[bool]
) -> None:
    most = 0 if room is None else room.most
    if max(top) > most:
        raise ValueError(f"{max(top)} likely tokens, the state has room for {most}")
    if any(prompts) and (room is None or not room.keeps_prompts):
        raise ValueError(
            "log-probabilities of prompts are asked for, the state keeps none"
        )


def _draft_bounds(count: int, min_drafts, max_drafts, block_length: int):
    """Both bounds as one number per request."""
    max_drafts = block_length if max_drafts is None else max_drafts
    bounds = {
        "min_drafts": np.asarray(min_drafts),
        "max_drafts": np.asarray(max_drafts),
    }
    for name, bound in bounds.items():
        whole = np.issubdtype(bound.dtype, np.integer)
        if not whole or bound.shape not in ((), (count,)):
            raise ValueError(
                f"{name} must be a whole number or {count} of them (one per prompt), "
                f"got {bound.tolist()}"
            )
    least_N, most_N = (
        np.broadcast_to(each, (count,)).astype(np.int32) for each in bounds.values()
    )
    if np.any((least_N < 0) | (least_N > most_N) | (most_N > block_length)):
        raise ValueError(
            "drafts verified must satisfy 0 <= min_drafts <= max_drafts <= "
            f"{block_length}, got min_drafts {min_drafts} and max_drafts {max_drafts}"
        )
    return least_N, most_N


def whole_numbers(name: str, values: Sequence[int]) -> np.ndarray:
    """The values as an array; NumPy would cut what is no integer without a word."""
    array = np.asarray(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be whole numbers, got {array.tolist()}")
    return array
