"""What a scheduler knows of a round: how likely drafts survive, what it may verify.

Survival falls within a block, so taking the likeliest drafts of all slots always takes
prefixes; ties go to the earlier draft.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Verification:
    """What a scheduler decides.

    Attributes:
      lengths_B: drafts of each slot that are verified.
      bucket: index of the token bucket that holds them and the anchors.
    """

    lengths_B: Int[Array, " B"]
    bucket: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Survival of drafts, and the bounds within which a scheduler chooses.

    Attributes:
      survival_BG: chance that the first j + 1 drafts are all accepted; of several
        rounds [n, B, G] where only expected tokens are asked for.
      min_drafts_B: drafts that must be verified.
      max_drafts_B: drafts that may be, at least `min_drafts_B`; 0 for slots that do not
        decode.
      live_B: slots that decode.
      reading: slots whose prompts are read between rounds, and wait for them.
    """

    survival_BG: Float[Array, "*n B G"]
    min_drafts_B: Int[Array, " B"]
    max_drafts_B: Int[Array, " B"]
    live_B: Bool[Array, " B"]
    reading: Int[Array, ""]

    @classmethod
    def of(
        cls,
        survival_BG: Float[Array, "*n B G"],
        *,
        min_drafts_B: Int[Array, " B"] | None = None,
        max_drafts_B: Int[Array, " B"] | None = None,
        live_B: Bool[Array, " B"] | None = None,
        reading: Int[Array, ""] | int = 0,
    ) -> "Forecast":
        """By default all slots decode and any number of drafts may be verified."""
        slots, block_length = survival_BG.shape[-2:]
        if live_B is None:
            live_B = jnp.ones((slots,), bool)
        if max_drafts_B is None:
            max_drafts_B = jnp.full((slots,), block_length)
        if min_drafts_B is None:
            min_drafts_B = jnp.zeros((slots,), jnp.int32)
        max_drafts_B = jnp.where(live_B, max_drafts_B, 0)
        return cls(
            survival_BG=survival_BG,
            min_drafts_B=jnp.minimum(min_drafts_B, max_drafts_B),
            max_drafts_B=max_drafts_B,
            live_B=live_B,
            reading=jnp.asarray(reading, jnp.int32),
        )

    @property
    def anchors(self) -> Int[Array, ""]:
        """Tokens verified without any draft."""
        return jnp.sum(self.live_B)

    def first(self, length: int) -> "Forecast":
        """The forecast for blocks of at most `length` drafts."""
        return replace(
            self,
            survival_BG=self.survival_BG[..., :length],
            min_drafts_B=jnp.minimum(self.min_drafts_B, length),
            max_drafts_B=jnp.minimum(self.max_drafts_B, length),
        )

    def ranked(self) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
        """Drafts in the order they are admitted, and what each adds to tau.

        Drafts that must be verified come first, those that may not last, adding 0.
        """
        draft_G1 = jnp.arange(self.survival_BG.shape[1])[:, None]
        may_GB = draft_G1 < self.max_drafts_B
        key_GB = jnp.where(draft_G1 < self.min_drafts_B, 2.0, self.survival_BG.T)
        order_N = jnp.argsort(
            jnp.where(may_GB, key_GB, -1.0).ravel(), descending=True, stable=True
        )
        gain_N = jnp.where(may_GB, self.survival_BG.T, 0.0).ravel()[order_N]
        return order_N, gain_N

    def expected_tokens(self) -> Float[Array, " N"]:
        """tau when the first 0, 1, 2, ... drafts in order are verified.

        The mean over rounds where there are several.
        """
        if self.survival_BG.ndim > 2:
            each = jax.vmap(lambda s: replace(self, survival_BG=s).expected_tokens())
            return jnp.mean(each(self.survival_BG), axis=0)
        _, gain_N = self.ranked()
        return self.anchors + jnp.concatenate([jnp.zeros((1,)), jnp.cumsum(gain_N)])

    def worth(self) -> Float[Array, " N"]:
        """What is weighed against seconds: tau, and a token for each slot that waits.

        A longer round is paid for by those too whose prompts are being read. With them,
        drafts pay where they gain more per second than plain rounds of all slots do.
        """
        return self.expected_tokens() + self.reading

    def admit(self, count: Int[Array, ""]) -> Int[Array, " B"]:
        """Verification lengths that take the `count` first drafts in order."""
        order_N, _ = self.ranked()
        taken_N = (
            jnp.zeros(order_N.shape, bool)
            .at[order_N]
            .set(jnp.arange(len(order_N)) < count)
        )
        taken_GB = taken_N.reshape(self.survival_BG.T.shape)
        lengths_B = jnp.sum(taken_GB, axis=0, dtype=jnp.int32)
        return jnp.minimum(lengths_B, self.max_drafts_B)

    def verify(
        self, lengths_B: Int[Array, " B"], sizes: tuple[int, ...]
    ) -> Verification:
        """The lengths within bounds, and the smallest of the buckets that holds them.

        Args:
          lengths_B: verification lengths that a schedule asks for. Where the largest
            bucket cannot hold as many, the least likely drafts are left out.
          sizes: token buckets, ascending.
        """
        lengths_B = jnp.clip(lengths_B, self.min_drafts_B, self.max_drafts_B)
        lengths_B = replace(self, max_drafts_B=lengths_B).admit(
            sizes[-1] - self.anchors
        )
        tokens = self.anchors + jnp.sum(lengths_B)
        return Verification(lengths_B, smallest_bucket(sizes, tokens))

    def fill(self, bucket: Int[Array, ""], sizes: tuple[int, ...]) -> Verification:
        """The likeliest drafts, as many as one of the buckets has room for."""
        return self.verify(self.admit(jnp.array(sizes)[bucket] - self.anchors), sizes)


def smallest_bucket(sizes: tuple[int, ...], tokens: Int[Array, ""]) -> Int[Array, ""]:
    """Index of the smallest bucket with room for `tokens`; of the last if none has."""
    index = jnp.searchsorted(jnp.array(sizes), tokens)
    return jnp.minimum(index, len(sizes) - 1).astype(jnp.int32)
