"""Rounds of a batch in which outputs are under grammars.

Such a round is run in its two halves. Between them the host works out which tokens may
come behind every draft; all others of the batch take part, and nothing is masked for
them. Once no output under a grammar decodes, the rounds that are left can run as one.

On several processes each walks every grammar by itself. All read the same tokens and
drafts, and a grammar's walk depends on nothing else, so all have the same masks; each
gives its own shards' rows of them to the program.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxspark.decoding import DecodeOptions, DecodeState, Phase, draft, verify
from jaxspark.decoding.compiling import compiled
from jaxspark.drafters import Drafter
from jaxspark.generation.slots import Running, newest
from jaxspark.grammars import GrammarError
from jaxspark.grammars.matcher import ALL, words
from jaxspark.models import TargetModel
from jaxspark.parallel.mesh import put, readable
from jaxspark.parallel.rows import row_sharding


def grammar_rounds(
    target: TargetModel,
    drafter: Drafter,
    state: DecodeState,
    running: Mapping[int, Running],
    *,
    rounds: int,
    max_finished: int,
    options: DecodeOptions,
) -> tuple[DecodeState, int]:
    """Rounds as long as an output under a grammar decodes, bounded as `decode` is.

    Args:
      target: the model.
      drafter: what proposes.
      state: the slots; it is donated.
      running: what they hold. Outputs that their grammars fail are told so, and no more
        rounds are run.
      rounds: most of them.
      max_finished: returns once as many slots are finished.
      options: resolved.

    Returns:
      the state, and rounds that are left for `decode`.
    """
    masked = {
        slot: each
        for slot, each in running.items()
        if each.matcher is not None and each.unread <= 0
    }
    while rounds and masked:
        state = masked_round(target, drafter, state, masked, options)
        rounds -= 1
        phase_B = _advance(state, masked)
        if any(each.failure for each in masked.values()):
            return state, 0
        masked = {
            slot: masked[slot] for slot in masked if phase_B[slot] == Phase.DECODING
        }
        if np.sum(phase_B == Phase.FINISHED) >= max_finished:
            return state, 0
    return state, rounds


def masked_round(
    target: TargetModel,
    drafter: Drafter,
    state: DecodeState,
    masked: Mapping[int, Running],
    options: DecodeOptions,
) -> DecodeState:
    """One round, masked between its halves; donates `state`."""
    size = words(target.config.vocab_size)
    first_BU = np.full((state.slots, size), ALL)
    for slot, each in masked.items():
        first_BU[slot] = _masks(each, [])[0]
    state, drafted = compiled(draft)(
        target, drafter, state, put(first_BU, row_sharding()), options=options
    )
    drafts_BG, lengths_B = jax.device_get(
        readable((drafted.proposal.tokens_BG, drafted.verification.lengths_B))
    )
    masks_BQU = np.full((len(drafts_BG), drafts_BG.shape[1] + 1, size), ALL)
    for slot, each in masked.items():
        verified = drafts_BG[slot, : lengths_B[slot]].tolist()
        masks_BQU[slot, : len(verified) + 1] = _masks(each, verified)
    return compiled(verify)(
        target, drafter, state, drafted, put(masks_BQU, row_sharding()), options=options
    )


def _masks(each: Running, drafts: list[int]) -> np.ndarray:
    """Along drafts; any token may come where the grammar fails."""
    assert each.matcher is not None
    try:
        if each.failure is None:
            return each.matcher.masks_along(drafts)
    except GrammarError as error:
        each.failure = str(error)
    return np.full((len(drafts) + 1, 1), ALL)


def _advance(state: DecodeState, masked: Mapping[int, Running]) -> np.ndarray:
    """Takes what has come to the grammars; phases of all slots [B]."""
    since_B = np.zeros((state.slots,), np.int32)
    for slot, each in masked.items():
        assert each.matcher is not None
        since_B[slot] = len(each.request.ids) + each.matcher.taken
    phase_B, lengths_B, _, tokens_BW, _, _ = jax.device_get(
        newest(state, jnp.asarray(since_B), state.block_length + 1)
    )
    for slot, each in masked.items():
        assert each.matcher is not None
        gained = lengths_B[slot] - since_B[slot]
        try:
            if each.failure is None:
                each.matcher.advance(tokens_BW[slot, :gained].tolist())
        except GrammarError as error:
            each.failure = str(error)
    return phase_B
