"""Two drafters in one: prompt lookup where it is likely right, else a model.

Where a text repeats itself, copying drafts more than any model does; elsewhere it
drafts nothing of use. Each slot and round takes the source that promises more accepted
drafts, judged by its own history: with r the rate at which a source's drafts held (for
lookup by match length), a block of G promises r + r^2 + ... + r^G.

The choice depends on what earlier rounds committed and proposed, never on the random
numbers of this round's drafts, so all guarantees hold. When every slot copies, the
model is not run.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxspark.drafters.base import DraftContext, Drafter, DraftSampler, Proposal
from jaxspark.drafters.ngram import BELIEVED_RATES, NgramDrafter
from jaxspark.models import FlatTokens, TargetModel
from jaxspark.parallel.axes import all_of

# What is believed before a request has a history, and how many drafts that is worth.
_MODEL_RATE = 0.6
_PRIOR_DRAFTS = 12.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class History:
    """How the drafts of one request have fared.

    Attributes:
      tried_BM: drafts that were decided; column 0 is the model's, column m lookup's
        with a match of m tokens.
      held_BM: those that were right.
      drafts_BG: the last proposal.
      source_B: its column.
      length_B: committed tokens when it was made; 0 if there was none.
    """

    tried_BM: Float[Array, "B M"]
    held_BM: Float[Array, "B M"]
    drafts_BG: Int[Array, "B G"]
    source_B: Int[Array, " B"]
    length_B: Int[Array, " B"]

    @classmethod
    def start(cls, slots: int, longest: int, block_length: int) -> "History":
        """Nothing but prior belief."""
        known = len(BELIEVED_RATES) - 1
        rates = [BELIEVED_RATES[min(m, known)] for m in range(1, longest + 1)]
        rate_M = jnp.array([_MODEL_RATE, *rates], jnp.float32)
        tried_BM = jnp.full((slots, longest + 1), _PRIOR_DRAFTS, jnp.float32)
        return cls(
            tried_BM=tried_BM,
            held_BM=tried_BM * rate_M,
            drafts_BG=jnp.zeros((slots, block_length), jnp.int32),
            source_B=jnp.zeros((slots,), jnp.int32),
            length_B=jnp.zeros((slots,), jnp.int32),
        )

    def restarted(self, first_round_B: Bool[Array, " B"]) -> "History":
        """Prior belief again where a request has its first round."""
        fresh = History.start(
            len(first_round_B), self.tried_BM.shape[1] - 1, self.drafts_BG.shape[1]
        )

        def pick(new, old):
            first = first_round_B.reshape(-1, *[1] * (new.ndim - 1))
            return jnp.where(first, new, old)

        return jax.tree.map(pick, fresh, self)

    def updated(
        self, tokens_BS: Int[Array, "B S"], lengths_B: Int[Array, " B"]
    ) -> "History":
        """Compares the last proposal with what has been committed since."""
        place_BG = self.length_B[:, None] + jnp.arange(self.drafts_BG.shape[1])
        committed_BG = place_BG < lengths_B[:, None]
        committed_BG &= self.length_B[:, None] > 0
        # Shorter proposals are padded with what is no token.
        committed_BG &= self.drafts_BG >= 0
        last = tokens_BS.shape[1] - 1
        truth_BG = jnp.take_along_axis(tokens_BS, jnp.minimum(place_BG, last), axis=1)
        held_BG = jnp.cumprod(committed_BG & (truth_BG == self.drafts_BG), axis=1)
        # Decided are the drafts that held and the first that did not.
        before_BG = jnp.pad(held_BG, ((0, 0), (1, 0)), constant_values=1)[:, :-1]
        tried_BG = before_BG * committed_BG
        column_BM = self.source_B[:, None] == jnp.arange(self.tried_BM.shape[1])
        return replace(
            self,
            tried_BM=self.tried_BM + column_BM * tried_BG.sum(1, keepdims=True),
            held_BM=self.held_BM + column_BM * held_BG.sum(1, keepdims=True),
        )

    def rates(self) -> Float[Array, "B M"]:
        """Rate at which each source's drafts hold."""
        return self.held_BM / self.tried_BM


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HybridDrafter:
    """Prompt lookup beside another drafter; made by `hybrid`.

    Attributes:
      lookup: proposes copies.
      model: proposes otherwise.
    """

    lookup: NgramDrafter
    model: Any

    @property
    def block_length(self) -> int:
        """Most tokens it can propose at once."""
        return self.model.block_length

    @property
    def taps(self):
        """The model's."""
        return self.model.taps

    @property
    def may_skip(self) -> bool:
        """Whether the model may."""
        return self.model.may_skip

    @property
    def lookahead(self) -> int:
        """The model's."""
        return self.model.lookahead

    @property
    def in_one_pass(self) -> bool:
        """Whether the model drafts so."""
        return self.model.in_one_pass

    def check_target(self, target) -> None:
        """Whether the model fits."""
        self.model.check_target(target)

    def init_cache(self, slots: int, length: int) -> tuple[Any, History]:
        """The model's context and an empty history."""
        history = History.start(slots, self.lookup.longest, self.block_length)
        return self.model.init_cache(slots, length), history

    def observe(self, cache, taps_TmD: Float[Array, "T m D"], tokens: FlatTokens):
        """The model sees every token, whoever drafts."""
        return self.model.observe(cache[0], taps_TmD, tokens), cache[1]

    def propose(
        self,
        target: TargetModel,
        cache: tuple[Any, History],
        context: DraftContext,
        sampler: DraftSampler,
        block_length: int,
    ) -> tuple[Proposal, tuple[Any, History]]:
        """One proposal per slot, from the source that promises more."""
        rows, history = cache
        tokens_BS, lengths_B = context.tokens_BS, context.lengths_B
        history = history.restarted(context.first_round_B)
        history = history.updated(tokens_BS, lengths_B)
        copied_BG, match_B = self.lookup.find(tokens_BS, lengths_B, block_length)
        rates_BM = history.rates()
        rate_B = jnp.take_along_axis(rates_BM, match_B[:, None], axis=1)[:, 0]
        copies_B = match_B >= self.lookup.shortest
        copies_B &= _promise(rate_B, block_length) >= _promise(
            rates_BM[:, 0], block_length
        )
        proposal, rows = self._ask_model(
            target, rows, context, sampler, block_length, copies_B
        )
        copies_B1 = copies_B[:, None]
        rate_BG = jnp.broadcast_to(
            jax.scipy.special.logit(rate_B)[:, None], copied_BG.shape
        )
        tokens_BG = jnp.where(copies_B1, copied_BG, proposal.tokens_BG)
        unused = history.drafts_BG.shape[1] - block_length
        history = replace(
            history,
            drafts_BG=jnp.pad(tokens_BG, ((0, 0), (0, unused)), constant_values=-1),
            source_B=jnp.where(copies_B, match_B, 0),
            length_B=lengths_B,
        )
        return Proposal(
            tokens_BG=tokens_BG,
            lengths_B=jnp.where(copies_B, block_length, proposal.lengths_B),
            confidence_BG=jnp.where(copies_B1, rate_BG, proposal.confidence_BG),
            # A copy's confidence is a rate that held, whatever the model thinks.
            certainty_BG=jnp.where(copies_B1, 0.0, proposal.certainty_BG),
            q=replace(proposal.q, deterministic_B=copies_B),
        ), (rows, history)

    def _ask_model(self, target, rows, context, sampler, block_length, copies_B):
        """The model's proposal; anything of its shape if nobody needs it."""
        # What is streamed refers to the model's matrices, which `skip` would copy.
        sampler = replace(sampler, streams=False)

        def ask(rows):
            return self.model.propose(target, rows, context, sampler, block_length)

        def skip(rows):
            shapes, _ = jax.eval_shape(ask, rows)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), rows

        nobody = all_of(copies_B)
        return jax.lax.cond(nobody, skip, ask, rows)


def _promise(rate_B: Float[Array, " B"], block_length: int) -> Float[Array, " B"]:
    """Expected accepted drafts of a block whose drafts each hold with this rate."""
    return jnp.sum(rate_B[:, None] ** jnp.arange(1, block_length + 1), axis=1)


def hybrid(first: NgramDrafter, second: Drafter) -> HybridDrafter:
    """Lets `first` draft where it promises more than `second`.

    Raises:
      ValueError: `first` does not look up n-grams.
    """
    if not isinstance(first, NgramDrafter):
        raise ValueError(
            f"the first drafter of a hybrid must be an NgramDrafter, got "
            f"{type(first).__name__}"
        )
    return HybridDrafter(lookup=first, model=second)
