"""A draw from the softmax of each row of logits, and what is known of it afterwards.

Of logits z, temperature t and Gumbel noise n a row draws argmax(z/t + n), a sample of
softmax(z/t) (greedy rows: t = 1 and n = 0). All that decoding asks of the logits beside
it are sums that a pass over the vocabulary can carry, relative to the largest logit m
so far, with a = (z - m)/t:

    mass    sum exp(a)            log-normaliser
    whole   sum exp(z - m)        that at t = 1
    spread  sum exp(a) a          entropy
    others  sum exp(a + n) of all but the drawn token: the odds of its score

`Draws` of several parts of the vocabulary (lanes of a register, cores, shards) become
one by `combined`; the sums of each are of its own largest logit.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# The place of a token that no part has.
NOWHERE = 2**30
# exp of it is 0, and 0 times it too.
FAR = -1e4


class Rows(NamedTuple):
    """How rows are drawn.

    Attributes:
      temperature_R: 0 takes the best.
      keys_R2: the two words of each row's key, as int32; None draws without noise, the
        best of all rows.
    """

    temperature_R: Float[Array, " R"]
    keys_R2: Int[Array, "R 2"] | None = None

    @property
    def sampled_R(self):
        """1.0 where there is noise, 0.0 in greedy rows."""
        return (self.temperature_R > 0).astype(jnp.float32)

    @property
    def rate_R(self) -> Float[Array, " R"]:
        """1/t, kept within what float32 can multiply with."""
        temperature_R = jnp.where(self.temperature_R > 0, self.temperature_R, 1.0)
        return jnp.clip(1.0 / temperature_R, 1e-30, 1e30)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Draws:
    """Draws of R rows.

    Attributes:
      place_R: the drawn token's place, the lowest of equals.
      logit_R: its logit.
      noise_R: its noise; -inf where nothing was drawn.
      top_R, mass_R, whole_R, spread_R, others_R: see the module; None are the sums
        that nobody asked for.
      named_R: the logit of a token that was named; -inf where it is not in this part.
    """

    place_R: Int[Array, "*R"]
    logit_R: Float[Array, "*R"]
    noise_R: Float[Array, "*R"]
    top_R: Float[Array, "*R"]
    mass_R: Float[Array, "*R"]
    named_R: Float[Array, "*R"]
    whole_R: Float[Array, "*R"] | None = None
    spread_R: Float[Array, "*R"] | None = None
    others_R: Float[Array, "*R"] | None = None

    def log_prob(self, logit_R, rate_R) -> Float[Array, " R"]:
        """Of a token by its logit, at the rows' temperature."""
        return (logit_R - self.top_R) * rate_R - jnp.log(self.mass_R)

    def model_log_prob(self, logit_R) -> Float[Array, " R"]:
        """At temperature 1."""
        assert self.whole_R is not None
        return logit_R - self.top_R - jnp.log(self.whole_R)

    def entropy(self) -> Float[Array, " R"]:
        """Of softmax(z/t), in nats."""
        assert self.spread_R is not None
        return jnp.log(self.mass_R) - self.spread_R / self.mass_R

    def odds(self, rate_R) -> Float[Array, " R"]:
        """Log-odds that softmax gives the drawn token's score, noise included."""
        assert self.others_R is not None
        score_R = (self.logit_R - self.top_R) * rate_R + self.noise_R
        return score_R - jnp.log(self.others_R)


def combined(parts: Draws, rate_R: Float[Array, " R"]) -> Draws:
    """One draw from those of parts of the vocabulary, which lie along axis 0.

    The lowest place of equal scores is drawn, in whatever order the parts come.
    """
    top_R = jnp.max(parts.top_R, axis=0)
    below = jnp.maximum((parts.top_R - top_R) * rate_R, FAR)
    keep = jnp.exp(below)
    score = (parts.logit_R - top_R) * rate_R + parts.noise_R
    place = jnp.where(score == jnp.max(score, axis=0), parts.place_R, NOWHERE)
    place_R = jnp.min(place, axis=0)
    drawn = place == place_R
    whole_R = spread_R = others_R = None
    if parts.whole_R is not None:
        whole_R = jnp.sum(jnp.exp(parts.top_R - top_R) * parts.whole_R, axis=0)
    if parts.spread_R is not None:
        spread_R = jnp.sum(keep * (parts.spread_R + below * parts.mass_R), axis=0)
    if parts.others_R is not None:
        rest = jnp.where(drawn, 0.0, jnp.exp(score))
        others_R = jnp.sum(keep * parts.others_R + rest, axis=0)
    return Draws(
        place_R=place_R,
        logit_R=jnp.max(jnp.where(drawn, parts.logit_R, -jnp.inf), axis=0),
        noise_R=jnp.max(jnp.where(drawn, parts.noise_R, -jnp.inf), axis=0),
        top_R=top_R,
        mass_R=jnp.sum(keep * parts.mass_R, axis=0),
        named_R=jnp.max(parts.named_R, axis=0),
        whole_R=whole_R,
        spread_R=spread_R,
        others_R=others_R,
    )


def fields_of(certainty: bool) -> tuple[str, ...]:
    """Those that are there: with certainty or with the whole mass, place first."""
    sums = ("spread_R", "others_R") if certainty else ("whole_R",)
    return ("place_R", "logit_R", "noise_R", "top_R", "mass_R", "named_R", *sums)
