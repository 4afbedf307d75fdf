"""What a host knows of a request in a slot, and how it reads and writes slots."""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import starmap, zip_longest

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxspark.decoding import Admission, DecodeState, Sampling
from jaxspark.decoding.likeliest import Likeliest
from jaxspark.decoding.state import Counters
from jaxspark.generation.completion import Likely, PromptLogProb
from jaxspark.generation.request import CheckedRequest
from jaxspark.grammars import Matcher
from jaxspark.parallel.mesh import replicated


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What rounds did for one request.

    Attributes:
      rounds: target passes.
      drafted: those that drafted.
      drafts: drafts in them.
      verified: drafts verified.
      reached: per draft position, rounds that verified it with all before it accepted.
      accepted: per draft position, rounds that accepted it.
    """

    rounds: int = 0
    drafted: int = 0
    drafts: int = 0
    verified: int = 0
    reached: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()

    @classmethod
    def of(cls, counters: Counters, slot: int) -> "Counts":
        """Those of a slot, on the host."""
        return cls(
            rounds=int(counters.rounds_B[slot]),
            drafted=int(counters.drafted_B[slot]),
            drafts=int(counters.drafts_B[slot]),
            verified=int(counters.verified_B[slot]),
            reached=tuple(counters.reached_BG[slot].tolist()),
            accepted=tuple(counters.accepted_BG[slot].tolist()),
        )

    def plus(self, more: "Counts") -> "Counts":
        """The sum of both."""
        return self._with(more, operator.add)

    def since(self, before: "Counts") -> "Counts":
        """What was added to earlier counts."""
        return self._with(before, operator.sub)

    def _with(self, other: "Counts", by: Callable[[int, int], int]) -> "Counts":
        def each(mine: tuple[int, ...], theirs: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(starmap(by, zip_longest(mine, theirs, fillvalue=0)))

        return Counts(
            rounds=by(self.rounds, other.rounds),
            drafted=by(self.drafted, other.drafted),
            drafts=by(self.drafts, other.drafts),
            verified=by(self.verified, other.verified),
            reached=each(self.reached, other.reached),
            accepted=each(self.accepted, other.accepted),
        )


@dataclass(frozen=True)
class Ring:
    """What a state keeps of likely tokens for one slot, on the host.

    Attributes:
      kept: of all slots.
      slot: which of them.
      vocab: tokens that there are.
    """

    kept: Likeliest
    slot: int
    vocab: int

    def likely(self, position: int, count: int) -> Likely:
        """The most likely tokens at a position and their log-probabilities."""
        place, count = position % self.kept.ids_BRX.shape[1], min(count, self.vocab)
        ids = self.kept.ids_BRX[self.slot, place, :count]
        log_probs = self.kept.log_probs_BRX[self.slot, place, :count]
        return list(zip(ids.tolist(), log_probs.tolist()))

    def of_prompt(self, position: int, count: int) -> PromptLogProb:
        """What is told of a prompt's token."""
        place = position % self.kept.prompt_BR.shape[1]
        return PromptLogProb(
            log_prob=float(self.kept.prompt_BR[self.slot, place]),
            rank=int(self.kept.ranks_BR[self.slot, place]),
            top=self.likely(position, count),
        )


@dataclass
class Running:
    """A request that has a slot or waits for one, and its output so far.

    Attributes:
      request: what runs.
      salt: prefixes are shared only with requests that have the same.
      goal: tokens that it was admitted with, which are read before its rounds: its
        prompt, and what it had said before it was preempted.
      processed: how many of them were read.
      cached: tokens of its prompt whose rows were there when it was first admitted.
      tokens: its output.
      log_probs: of the output, where they are kept.
      top_log_probs: likely tokens beside the output's, where they are asked for.
      prompt_log_probs: of the prompt's tokens that were read, likewise.
      counts: what its rounds did.
      before: what they had done when it was admitted.
      matcher: its grammar behind the output so far; None if it has none.
      failure: why its grammar cannot go on; None while it can.
    """

    request: CheckedRequest
    salt: str | None = None
    goal: int = 0
    processed: int = 0
    cached: int | None = None
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    top_log_probs: list[Likely] = field(default_factory=list)
    prompt_log_probs: list[PromptLogProb | None] = field(default_factory=list)
    counts: Counts = Counts()
    before: Counts = Counts()
    matcher: Matcher | None = None
    failure: str | None = None

    def __post_init__(self) -> None:
        if self.request.matcher is not None:
            self.matcher = self.request.matcher.fork()

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the output so far."""
        return len(self.request.ids) + len(self.tokens)

    @property
    def unread(self) -> int:
        """Tokens that remain to be read before its rounds; the anchor is a round's."""
        return self.goal - 1 - self.processed

    def begin(self, processed: int) -> None:
        """It gets a slot, in which rows of its first tokens are there already."""
        self.goal, self.processed, self.before = self.length, processed, self.counts
        if self.cached is None:
            self.cached = processed

    @property
    def wants_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are still to be told.

        They come of reading it, so nothing of it may be taken as read.
        """
        told = len(self.prompt_log_probs)
        asked = self.request.params.prompt_log_probs is not None
        return asked and told < len(self.request.ids)

    @property
    def asks_likeliest(self) -> bool:
        """Whether there is something for it in a state's `likeliest`."""
        return self.request.params.top_log_probs > 0 or self.wants_prompt

    def take_likeliest(self, ring: Ring, new_tokens: int) -> list[Likely]:
        """Notes what the ring has of the prompt that was read, and of new tokens.

        Args:
          ring: the slot's.
          new_tokens: that came, the last of `tokens`.

        Returns:
          likely tokens beside each of the new ones; none if not asked for.
        """
        params, ids = self.request.params, self.request.ids
        if params.prompt_log_probs is not None:
            told = self.prompt_log_probs
            told += [None] if not told else []
            told += [
                ring.of_prompt(place, params.prompt_log_probs)
                for place in range(len(told), min(self.processed + 1, len(ids)))
            ]
        if not params.top_log_probs:
            return []
        end = len(ids) + len(self.tokens)
        places = range(end - new_tokens, end)
        new = [ring.likely(place, params.top_log_probs) for place in places]
        self.top_log_probs += new
        return new


def admission_of(admitted: Sequence[Running], state: DecodeState) -> Admission:
    """Requests in the form in which slots of `state` take them up."""
    requests = [each.request for each in admitted]
    params = [request.params for request in requests]
    return Admission.of(
        state,
        [each.request.ids + each.tokens for each in admitted],
        [request.limit for request in requests],
        Sampling.of(
            len(requests),
            temperature=[each.temperature for each in params],
            top_k=[each.top_k for each in params],
            top_p=[each.top_p for each in params],
            min_p=[each.min_p for each in params],
            seed=[request.seed for request in requests],
        ),
        stop_ids=[request.stop_ids for request in requests],
        adjustments=[request.adjustment for request in requests],
        prompt_lengths=[len(request.ids) for request in requests],
        top_log_probs=[each.top_log_probs for each in params],
        prompt_log_probs=[each.prompt_log_probs is not None for each in params],
        min_drafts=[request.min_drafts for request in requests],
        max_drafts=[request.max_drafts for request in requests],
        processed=[each.processed for each in admitted],
    )


@partial(jax.jit, static_argnames=("window",))
def newest(
    state: DecodeState, since_B: Int[Array, " B"], window: int
) -> tuple[Array, Array, Counters, Array, Array, Array]:
    """What a host wants to know after rounds.

    Args:
      state: the slots.
      since_B: places that it knows already.
      window: most places behind them.

    Returns:
      phases [B], lengths [B], counters, and from `since_B` on tokens [B, W] and
      log-probabilities and accepted drafts, each [B, W] or, if not kept, [B, 0].
    """
    place_BW = since_B[:, None] + jnp.arange(window)
    tokens_BW, log_probs_BW, accepted_BW = (
        jnp.take_along_axis(x_BS, place_BW, axis=1, mode="clip")
        if x_BS.shape[1]
        else jnp.zeros((state.slots, 0), x_BS.dtype)
        for x_BS in (state.tokens_BS, state.log_probs_BS, state.accepted_BS)
    )
    slots = state.phase_B, state.lengths_B, state.counters
    return replicated((*slots, tokens_BW, log_probs_BW, accepted_BW))


@jax.jit
def newest_likeliest(state: DecodeState) -> Likeliest | None:
    """All that is kept of likely tokens, as every process can read it."""
    return replicated(state.likeliest)


def prefill_chunk(lengths: Iterable[int], most: int = 128) -> int:
    """Tokens per slot and prefill pass for such prompts: a power of two from 16 on.

    Args:
      lengths: of the prompts.
      most: itself, whatever it is, if they are longer.
    """
    longest = max(lengths)
    least = min(16, most)
    return int(np.clip(2 ** np.ceil(np.log2(max(longest - 1, 1))), least, most))
