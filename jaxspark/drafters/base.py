"""The contract between a drafter and the decode loop.

A drafter proposes up to G tokens after each slot's *anchor*, the newest token, chosen
but not yet processed by the target. It keeps context rows by absolute position like the
target's caches, and it sees every committed position through `observe`: at prefill, and
for each row the target verifies. Rows of rejected drafts are garbage past the length.

A drafter never decides what is emitted, so a bad one costs speed and nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxspark.drafters.block_logits import BlockDistribution, BlockLogits
from jaxspark.drafters.distribution import DraftDistribution
from jaxspark.models import FlatTokens, TargetModel


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DraftContext:
    """What a drafter is told about the slots it drafts for.

    Attributes:
      tokens_BS: committed tokens; garbage past a slot's length.
      lengths_B: committed tokens that count; the last of them is the anchor.
      first_round_B: slots whose request has had no round yet, so that nothing
        remembered of earlier rounds is about it.
      pages_BP: where the slots' cache rows lie, as in `FlatTokens`.
    """

    tokens_BS: Int[Array, "B S"]
    lengths_B: Int[Array, " B"]
    first_round_B: Bool[Array, " B"]
    pages_BP: Int[Array, "B P"] | None = None

    @classmethod
    def of(
        cls, tokens_BS: Int[Array, "B S"], lengths_B: Int[Array, " B"]
    ) -> "DraftContext":
        """For requests in the middle of their rounds."""
        return cls(
            tokens_BS=tokens_BS,
            lengths_B=lengths_B,
            first_round_B=jnp.zeros(lengths_B.shape, bool),
        )

    @property
    def positions_B(self) -> Int[Array, " B"]:
        """Positions of the anchors."""
        return self.lengths_B - 1

    @property
    def anchors_B(self) -> Int[Array, " B"]:
        """The anchors' token ids."""
        position_B1 = self.positions_B[:, None]
        return jnp.take_along_axis(self.tokens_BS, position_B1, axis=1)[:, 0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Proposal:
    """Draft tokens and what verification needs to know about them.

    Attributes:
      tokens_BG: draft tokens; row j stands at position anchor + 1 + j.
      lengths_B: how many of them are meant, 0..G.
      confidence_BG: logits of P(token j accepted | all before it accepted).
      certainty_BG: how decided each draft was, see `Drawn`; 0 where nobody knows.
      q: the distribution each token was drawn from.
    """

    tokens_BG: Int[Array, "B G"]
    lengths_B: Int[Array, " B"]
    confidence_BG: Float[Array, "B G"]
    certainty_BG: Float[Array, "B G"]
    q: DraftDistribution | BlockDistribution = DraftDistribution()

    @classmethod
    def empty(cls, slots: int) -> "Proposal":
        """Blocks of no drafts."""
        return cls(
            tokens_BG=jnp.zeros((slots, 0), jnp.int32),
            lengths_B=jnp.zeros((slots,), jnp.int32),
            confidence_BG=jnp.zeros((slots, 0), jnp.float32),
            certainty_BG=jnp.zeros((slots, 0), jnp.float32),
        )

    def padded(self, length: int) -> "Proposal":
        """Blocks of `length` drafts, of which the last are not meant.

        Without q, for couplings that do not ask what drafts were drawn from.
        """
        missing = length - self.tokens_BG.shape[1]

        def pad(x_BG: Array) -> Array:
            return jnp.pad(x_BG, ((0, 0), (0, missing)))

        return Proposal(
            tokens_BG=pad(self.tokens_BG),
            lengths_B=self.lengths_B,
            confidence_BG=pad(self.confidence_BG),
            certainty_BG=pad(self.certainty_BG),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drawn:
    """One draft of every slot.

    Attributes:
      tokens_B: target ids.
      log_q_BW: the log-distribution they were drawn from, over the draft vocabulary.
      certainty_B: how decided that was, the larger the more. Where the output does not
        depend on drafts (at temperature 0, under the gumbel coupling) the log-odds that
        softmax gives the drafted token's score, noise included: of its being chosen by
        a target whose scores differ by Gumbel noise. Under rejection sampling minus
        the entropy of q in nats, which is known before the draft is drawn.
    """

    tokens_B: Int[Array, " B"]
    log_q_BW: Float[Array, "B W"]
    certainty_B: Float[Array, " B"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Streamed:
    """One draft of every slot, of logits that nobody has written.

    Attributes:
      tokens_B, certainty_B: see `Drawn`.
      log_q_B: log-probabilities of the tokens.
      latent_BR: what they were drawn from, with the block's `BlockLogits`.
    """

    tokens_B: Int[Array, " B"]
    certainty_B: Float[Array, " B"]
    log_q_B: Float[Array, " B"]
    latent_BR: Float[Array, "B R"]


@runtime_checkable
class DraftSampler(Protocol):
    """How the decode loop lets a drafter sample; the coupling is hidden inside."""

    @property
    def streams(self) -> bool:
        """Whether it draws from a sequential head without logits being written."""

    def __call__(
        self,
        logits_BW: Float[Array, "B W"],
        j: Int[Array, ""],
        ids_W: Int[Array, " W"] | None,
    ) -> Drawn:
        """Samples draft j of every slot, from a draft vocabulary of target ids."""

    def stream(
        self,
        logits: BlockLogits,
        j: Int[Array, ""],
        latent_BR: Float[Array, "B R"],
        ids_W: Int[Array, " W"] | None,
    ) -> Streamed:
        """The same, where it streams."""

    def suggested(self, certainty_BG: Float[Array, "B G"]) -> Float[Array, "B G"]:
        """Confidence logits that certainty suggests, for drafters without a head."""


@runtime_checkable
class Drafter(Protocol):
    """What proposes. Methods are pure; parameters are the drafter's pytree leaves."""

    @property
    def block_length(self) -> int:
        """Most tokens it can propose at once."""

    @property
    def taps(self) -> Sequence[int]:
        """Target layers whose outputs `observe` needs (-1: the embedding)."""

    @property
    def may_skip(self) -> bool:
        """Whether it may propose nothing, so that rounds vary in size."""

    @property
    def lookahead(self) -> int:
        """Tokens behind a position that its context rows there depend on.

        Rows of rings do not count: they are never shared.
        """

    @property
    def in_one_pass(self) -> bool:
        """Whether it drafts a block in one pass over its cache, not token by token."""

    def check_target(self, target: Any) -> None:
        """Raises `ValueError` if it cannot draft for a target of this configuration."""

    def init_cache(self, slots: int, length: int) -> Any:
        """An empty context for `slots` sequences of up to `length` positions."""

    def observe(
        self, cache: Any, taps_TmD: Float[Array, "T m D"], tokens: FlatTokens
    ) -> Any:
        """Writes the context rows of tokens that the target has just processed."""

    def propose(
        self,
        target: TargetModel,
        cache: Any,
        context: DraftContext,
        sampler: DraftSampler,
        block_length: int,
    ) -> tuple[Proposal, Any]:
        """Drafts tokens after each anchor; its cache rows before it are valid."""


class WithoutContext:
    """Drafters that need neither the target's features nor rows of their own."""

    taps: ClassVar[tuple[int, ...]] = ()
    lookahead: ClassVar[int] = 0
    in_one_pass: ClassVar[bool] = True

    def check_target(self, target: Any) -> None:
        """Any target will do."""

    def init_cache(self, slots: int, length: int) -> tuple[()]:
        """Nothing to remember."""
        return ()

    def observe(
        self, cache: tuple[()], taps_TmD: Float[Array, "T m D"], tokens: FlatTokens
    ) -> tuple[()]:
        """Nothing to remember."""
        return cache


def pairs_before(tokens: FlatTokens) -> FlatTokens:
    """The tokens at the positions before their own, where the pairs they complete lie.

    For drafters whose context rows are pairs of a feature and the token after it. The
    feature before a slot's first token does not exist, nor its pair: it is padding.
    """
    begins_B = (tokens.starts_B == 0) & (tokens.counts_B > 0)
    return replace(
        tokens,
        positions_T=jnp.maximum(tokens.positions_T - 1, 0),
        slots_T=jnp.where(tokens.positions_T > 0, tokens.slots_T, -1),
        starts_B=jnp.maximum(tokens.starts_B - 1, 0),
        offsets_B=tokens.offsets_B + begins_B,
        counts_B=tokens.counts_B - begins_B,
    )
