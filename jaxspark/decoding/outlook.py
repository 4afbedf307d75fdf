"""What a scheduler knows of a round: how likely drafts survive, and what it may choose.

Survival falls within a block, so taking the likeliest drafts of all slots always takes
prefixes; ties go to the earlier draft.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What a scheduler knows.

    Attributes:
      survival_BG: chance that the first j + 1 drafts are all accepted; of several
        rounds [n, B, G] where only expected tokens are asked for.
      floor_B: drafts that must be verified.
      most_B: drafts that may be, at least `floor_B`; 0 for slots that are done.
      live_B: slots that are not done.
    """

    survival_BG: Float[Array, "*n B G"]
    floor_B: Int[Array, " B"]
    most_B: Int[Array, " B"]
    live_B: Bool[Array, " B"]

    @classmethod
    def of(
        cls,
        survival_BG: Float[Array, "*n B G"],
        *,
        floor_B: Int[Array, " B"] | None = None,
        most_B: Int[Array, " B"] | None = None,
        live_B: Bool[Array, " B"] | None = None,
    ) -> "Outlook":
        """All slots live and all drafts open to choice, where nothing else is said."""
        slots, block_length = survival_BG.shape[-2:]
        live_B = jnp.ones((slots,), bool) if live_B is None else live_B
        most_B = jnp.full((slots,), block_length) if most_B is None else most_B
        most_B = jnp.where(live_B, most_B, 0)
        floor_B = jnp.zeros((slots,), jnp.int32) if floor_B is None else floor_B
        return cls(
            survival_BG=survival_BG,
            floor_B=jnp.minimum(floor_B, most_B),
            most_B=most_B,
            live_B=live_B,
        )

    @property
    def anchors(self) -> Int[Array, ""]:
        """Tokens verified without any draft."""
        return jnp.sum(self.live_B)

    def first(self, length: int) -> "Outlook":
        """The same of no more than the first `length` drafts."""
        return replace(
            self,
            survival_BG=self.survival_BG[..., :length],
            floor_B=jnp.minimum(self.floor_B, length),
            most_B=jnp.minimum(self.most_B, length),
        )

    def ranked(self) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
        """Drafts in the order they are admitted, and what each adds to tau.

        Drafts that must be verified come first, those that may not last, adding 0.
        """
        draft_G1 = jnp.arange(self.survival_BG.shape[1])[:, None]
        may_GB = draft_G1 < self.most_B
        key_GB = jnp.where(draft_G1 < self.floor_B, 2.0, self.survival_BG.T)
        order_N = jnp.argsort(
            jnp.where(may_GB, key_GB, -1.0).ravel(), descending=True, stable=True
        )
        gain_N = jnp.where(may_GB, self.survival_BG.T, 0.0).ravel()[order_N]
        return order_N, gain_N

    def expected_tokens(self) -> Float[Array, " N"]:
        """tau when the first 0, 1, 2, ... drafts in order are verified.

        Of several rounds the mean.
        """
        if self.survival_BG.ndim > 2:
            each = jax.vmap(lambda s: replace(self, survival_BG=s).expected_tokens())
            return jnp.mean(each(self.survival_BG), axis=0)
        _, gain_N = self.ranked()
        return self.anchors + jnp.concatenate([jnp.zeros((1,)), jnp.cumsum(gain_N)])

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
        return jnp.minimum(lengths_B, self.most_B)

    def within(self, lengths_B: Int[Array, " B"], tokens: int) -> Int[Array, " B"]:
        """`lengths_B` within what may be verified, `tokens` in all with anchors."""
        lengths_B = jnp.clip(lengths_B, self.floor_B, self.most_B)
        return replace(self, most_B=lengths_B).admit(tokens - self.anchors)
