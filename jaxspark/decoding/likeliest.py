"""The most likely tokens beside those that were put out, and beside a prompt's.

Like all log-probabilities that are told they are the model's own, before temperature,
filters and adjustments (vLLM's `raw_logprobs`). They are kept by position in a ring
that is as long as what may come between two looks of the host.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxspark.models import FlatTokens
from jaxspark.parallel import vocabulary
from jaxspark.parallel.axes import MODEL, bound


@dataclass(frozen=True, kw_only=True)
class LikeliestLimits:
    """What a state keeps of likely tokens; by default nothing.

    Attributes:
      tokens: most that are told at a position.
      prompts: whether they are told of prompts too.
      positions: between two looks of the host; None for all of a slot.
    """

    tokens: int = 0
    prompts: bool = False
    positions: int | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Likeliest:
    """Likely tokens of B slots. R is the ring's length; place p mod R has position p.

    Attributes:
      wanted_B: how many are told beside each output token.
      of_prompt_B: whether log-probabilities of the prompt are told.
      ids_BRX: the most likely tokens, best first; ties go to the lowest id.
      log_probs_BRX: theirs.
      prompt_BR: log-probabilities of the prompt's own tokens; no places where prompts
        are not told.
      ranks_BR: the places of these in the order of likelihood, from 1; ties by id.
    """

    wanted_B: Int[Array, " B"]
    of_prompt_B: Bool[Array, " B"]
    ids_BRX: Int[Array, "B R X"]
    log_probs_BRX: Float[Array, "B R X"]
    prompt_BR: Float[Array, "B R"]
    ranks_BR: Int[Array, "B R"]

    @classmethod
    def empty(
        cls, limits: LikeliestLimits, *, slots: int, capacity: int
    ) -> "Likeliest | None":
        """Of slots that want nothing; None where nothing is kept."""
        if not limits.tokens and not limits.prompts:
            return None
        ring = capacity if limits.positions is None else limits.positions
        ring = min(ring, capacity)
        top = (slots, ring, limits.tokens)
        of_prompt = (slots, ring if limits.prompts else 0)
        return cls(
            wanted_B=jnp.zeros((slots,), jnp.int32),
            of_prompt_B=jnp.zeros((slots,), bool),
            ids_BRX=jnp.zeros(top, jnp.int32),
            log_probs_BRX=jnp.zeros(top, jnp.float32),
            prompt_BR=jnp.zeros(of_prompt, jnp.float32),
            ranks_BR=jnp.zeros(of_prompt, jnp.int32),
        )

    @property
    def most(self) -> int:
        """Tokens kept at each position."""
        return self.ids_BRX.shape[2]

    @property
    def keeps_prompts(self) -> bool:
        """Whether prompts can be told."""
        return self.prompt_BR.shape[1] > 0

    def told(
        self,
        logits_TV: Float[Array, "T V"],
        tokens: FlatTokens,
        kept_T: Bool[Array, " T"],
    ) -> "Likeliest":
        """With the likely tokens behind rows of an output, where any slot wants them.

        Args:
          logits_TV: of the rows, as the model gives them.
          tokens: the rows; what is behind one is at the position after it.
          kept_T: rows behind which something was committed.
        """
        if not self.most:
            return self
        kept_T &= self.wanted_B[tokens.slots_T] > 0
        return jax.lax.cond(
            jnp.any(kept_T),
            lambda: self._with_top(logits_TV, tokens, kept_T),
            lambda: self,
        )

    def told_prompt(
        self,
        logits_TV: Float[Array, "T V"],
        tokens: FlatTokens,
        slots_T: Int[Array, " T"],
        next_T: Int[Array, " T"],
        kept_T: Bool[Array, " T"],
    ) -> "Likeliest":
        """With what is told of a prompt's tokens, from the rows before them.

        Args:
          logits_TV: of the rows, as the model gives them.
          tokens: the rows.
          slots_T: the slots they belong to.
          next_T: the tokens after them.
          kept_T: rows whose next token is told.
        """
        row_T, shift_T = jnp.arange(len(next_T)), vocabulary.logsumexp(logits_TV)
        own_T = vocabulary.pick(logits_TV, row_T, next_T)
        better_TV = logits_TV > own_T[:, None]
        first_TV = vocabulary.places(logits_TV.shape[1]) < next_T[:, None]
        better_TV |= (logits_TV == own_T[:, None]) & first_TV
        at = self._at(tokens, slots_T, kept_T)
        ranks_T = 1 + vocabulary.sums(better_TV.astype(jnp.int32))
        told = replace(
            self,
            prompt_BR=self.prompt_BR.at[at].set(own_T - shift_T, mode="drop"),
            ranks_BR=self.ranks_BR.at[at].set(ranks_T, mode="drop"),
        )
        if not self.most:
            return told
        return told._put_top(logits_TV, shift_T, at)

    def _with_top(self, logits_TV, tokens, kept_T):
        shift_T = vocabulary.logsumexp(logits_TV)
        return self._put_top(
            logits_TV, shift_T, self._at(tokens, tokens.slots_T, kept_T)
        )

    def _put_top(self, logits_TV, shift_T, at):
        values_TX, ids_TX = best(logits_TV, self.most)
        values_TX = values_TX - shift_T[:, None]
        return replace(
            self,
            ids_BRX=self.ids_BRX.at[at].set(ids_TX, mode="drop"),
            log_probs_BRX=self.log_probs_BRX.at[at].set(values_TX, mode="drop"),
        )

    def _at(self, tokens, slots_T, kept_T):
        """Places of what is behind rows; out of range for those that are not kept."""
        slots, ring = self.ids_BRX.shape[:2]
        return jnp.where(kept_T, slots_T, slots), (tokens.positions_T + 1) % ring


def best(
    logits_TV: Float[Array, "T V"], count: int
) -> tuple[Float[Array, "T X"], Int[Array, "T X"]]:
    """The largest logits of each row and their tokens, best first."""
    width = logits_TV.shape[1]
    values_TX, ids_TX = jax.lax.top_k(logits_TV, min(count, width))
    if bound(MODEL):
        # Of all shards' best, in the order of their parts: ties stay in order.
        ids_TX = vocabulary.whole(ids_TX + vocabulary.first(width))
        values_TX = vocabulary.whole(values_TX)
        values_TX, place_TX = jax.lax.top_k(values_TX, min(count, values_TX.shape[1]))
        ids_TX = jnp.take_along_axis(ids_TX, place_TX, axis=1)
    missing = ((0, 0), (0, count - ids_TX.shape[1]))
    values_TX = jnp.pad(values_TX, missing, constant_values=-jnp.inf)
    return values_TX, jnp.pad(ids_TX, missing)
