"""Learns while decoding how likely drafts are accepted.

A drafter without a confidence head, or one that nobody calibrated for this target and
these texts, says little of use about its drafts. What it said of those that were
verified, and whether they were accepted, tells how to read it:

    P(draft j accepted | all before it) = sigmoid(v c_j + w s_j + a + d_j)

with its confidence c (of the calibration, where there is one) and the certainty s of
the draft; v, w and a are shared by all places of a block, d_j is one place's own. The
prior is (v, w, a, d) = (1, 0, 0, 0): confidences as they are. All slots learn together,
greedy ones and sampled ones apart, whose acceptance follows other laws. Every few
rounds the regression (`logistic`) goes on, from where it was, over the blocks
remembered, so that it follows what texts are about.

*Which drafts are looked at.* Verified ones before which all were accepted: the outcome
of others is not known. That a schedule chose what was verified does no harm, since it
chose by the same signals that the regression is given.

*Why the output keeps its distribution.* Under rejection sampling, how many drafts of a
slot are verified may depend on anything but the drafts themselves and the random
numbers that decide their fate (appendix A of the paper; each schedule says what it
looks at). Let F be everything that happened in earlier rounds, in all slots. The
coefficients are a function of F: a round is scheduled first, and observed when it is
over. Given F, this round's drafts and random numbers are as fresh as they would be
with fixed coefficients, because each round draws from streams named by the request's
seed and the position of its anchor, no two rounds of a request have the same anchor,
and requests have seeds of their own (as for all schedules, see there: a seed that was
used before, by a request that F remembers, is not fresh). So given F, whatever it is,
a slot's next tokens are distributed as the target's; and therefore also on the whole,
by induction over rounds. That F holds the outcomes of this very request, and of those
beside it, changes which fixed schedule it is that a round meets, never the law of what
comes out. It would not do to learn from a round before it is scheduled, nor to let s
tell the drafted token: s is of the distribution (its entropy) under rejection sampling.
Greedily and under the gumbel coupling the output depends on no schedule at all.
`jaxspark.exactness.estimated_rounds` enumerates two rounds, with coefficients that
differ after every course of the first.

*Why in the loop.* A host that fitted between calls would fit at other rounds whenever
calls are cut otherwise, and on several processes would have to agree on numbers. Inside
it is one more deterministic function of the state: sums over shards of slots are
collectives, so that all have the same coefficients, to the last bit.

Nothing fitted yet, and confidences that are all alike, only mean that every block is
cut at the same place.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxspark.decoding.logistic import Coefficients, Prior, newton_step
from jaxspark.parallel.axes import max_of

# Standard deviations: 0.5 of v, 0.35 of w, 2 of a and 0.5 of d.
PRIOR = Prior(mean=(1.0, 0.0, 0.0), precision=(4.0, 8.0, 0.25), place_precision=4.0)
# Signals beyond this say no more; one of them must not rule a fit.
_LARGEST_SIGNAL = 10.0
_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """How acceptance is learned; part of the compiled round.

    Attributes:
      every: rounds that draft from one fit to the next.
      blocks: blocks remembered, at least 8 of each slot: what is older is forgotten.
      prior: of the coefficients.
    """

    every: int = 8
    blocks: int = 512
    prior: Prior = PRIOR

    def __post_init__(self):
        for name in ("every", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}"
                )

    def empty(self, slots: int, block_length: int) -> "EstimatorState":
        """Nothing observed yet."""
        n = max(8, -(-self.blocks // slots))

        def zeros(*shape, dtype=jnp.float32):
            return jnp.zeros((slots, *shape), dtype)

        start = self.prior.coefficients(block_length)
        both = (slots, 2)
        return EstimatorState(
            confidence_BnG=zeros(n, block_length),
            certainty_BnG=zeros(n, block_length),
            forecast_BnG=zeros(n, block_length),
            judged_Bn=zeros(n, dtype=jnp.int32),
            accepted_Bn=zeros(n, dtype=jnp.int32),
            sampled_Bn=zeros(n, dtype=bool),
            place_B=zeros(dtype=jnp.int32),
            rounds_B=zeros(dtype=jnp.int32),
            shared_BRX=jnp.broadcast_to(start.shared_X, (*both, 3)),
            places_BRG=jnp.broadcast_to(start.places_G, (*both, block_length)),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class EstimatorState:
    """What was observed lately, and what was learned from it.

    The first two axes of what is remembered are one ring of B n blocks, whichever slots
    they come from; each shard of slots has its own.

    Attributes:
      confidence_BnG: of remembered blocks, see `logits`.
      certainty_BnG: likewise.
      forecast_BnG: chance of acceptance that was forecast for each draft.
      judged_Bn: drafts whose outcome is known; 0 for blocks that were not played.
      accepted_Bn: drafts accepted.
      sampled_Bn: blocks of slots that were not greedy.
      place_B: where the ring goes on; the same for all slots of a shard.
      rounds_B: rounds since the last fit; the same for all.
      shared_BRX: v, w and a, greedily (R = 0) and sampling (1); the same for all slots.
      places_BRG: d; likewise.
    """

    confidence_BnG: Float[Array, "B n G"]
    certainty_BnG: Float[Array, "B n G"]
    forecast_BnG: Float[Array, "B n G"]
    judged_Bn: Int[Array, "B n"]
    accepted_Bn: Int[Array, "B n"]
    sampled_Bn: Bool[Array, "B n"]
    place_B: Int[Array, " B"]
    rounds_B: Int[Array, " B"]
    shared_BRX: Float[Array, "B 2 3"]
    places_BRG: Float[Array, "B 2 G"]

    def logits(
        self,
        confidence_BG: Float[Array, "B g"],
        certainty_BG: Float[Array, "B g"],
        sampled_B: Bool[Array, " B"],
    ) -> Float[Array, "B g"]:
        """Of P(draft j accepted | all before it accepted), as learned so far.

        Args:
          confidence_BG: logits that the estimate starts from.
          certainty_BG: how decided the drafts were.
          sampled_B: slots that are not greedy.
        """
        slot_B, regime_B = jnp.arange(len(sampled_B)), sampled_B.astype(jnp.int32)
        own = Coefficients(
            self.shared_BRX[slot_B, regime_B], self.places_BRG[slot_B, regime_B]
        )
        signals_BGX = _signals(confidence_BG, certainty_BG)
        return jax.vmap(Coefficients.logits)(own, signals_BGX)

    def observed(
        self,
        estimator: Estimator,
        *,
        confidence_BG: Float[Array, "B g"],
        certainty_BG: Float[Array, "B g"],
        sampled_B: Bool[Array, " B"],
        judged_B: Int[Array, " B"],
        accepted_B: Int[Array, " B"],
    ) -> "EstimatorState":
        """After a round that drafted g tokens; every few of them, with a new fit.

        Args:
          estimator: says how often.
          confidence_BG: see `logits`.
          certainty_BG: likewise.
          sampled_B: likewise.
          judged_B: drafts whose outcome is known; 0 in slots that took no part.
          accepted_B: drafts accepted, all of those judged or one fewer.
        """
        logits_BG = self.logits(confidence_BG, certainty_BG, sampled_B)
        slots, n, block = self.confidence_BnG.shape
        recorded_B = judged_B > 0
        place_B = (self.place_B + jnp.cumsum(recorded_B) - 1) % (slots * n)
        # Out of range, and dropped.
        place_B = jnp.where(recorded_B, place_B, slots * n)
        short = block - confidence_BG.shape[1]

        def put(ring, new):
            if ring.ndim == 3:
                new = jnp.pad(new, ((0, 0), (0, short)))
            flat = ring.reshape(slots * n, *ring.shape[2:])
            return flat.at[place_B].set(new, mode="drop").reshape(ring.shape)

        remembered = replace(
            self,
            confidence_BnG=put(self.confidence_BnG, confidence_BG),
            certainty_BnG=put(self.certainty_BnG, certainty_BG),
            forecast_BnG=put(self.forecast_BnG, jax.nn.sigmoid(logits_BG)),
            judged_Bn=put(self.judged_Bn, judged_B),
            accepted_Bn=put(self.accepted_Bn, accepted_B),
            sampled_Bn=put(self.sampled_Bn, sampled_B),
            place_B=(self.place_B + jnp.sum(recorded_B)) % (slots * n),
            rounds_B=self.rounds_B + 1,
        )
        return jax.lax.cond(
            max_of(remembered.rounds_B) >= estimator.every,
            lambda: remembered.fitted(estimator.prior),
            lambda: remembered,
        )

    def fitted(self, prior: Prior) -> "EstimatorState":
        """With coefficients that go on towards the likeliest ones."""
        slots, n, block = self.confidence_BnG.shape
        draft_G = jnp.arange(block)

        def flat(x):
            return x.reshape(slots * n, *x.shape[2:])

        signals_NGX = _signals(flat(self.confidence_BnG), flat(self.certainty_BnG))
        happened_NG = draft_G < flat(self.accepted_Bn)[:, None]
        known_NG = draft_G < flat(self.judged_Bn)[:, None]
        sampled_N1 = flat(self.sampled_Bn)[:, None]

        def of_regime(regime: int) -> Coefficients:
            at = Coefficients(self.shared_BRX[0, regime], self.places_BRG[0, regime])
            own_NG = known_NG & (sampled_N1 == bool(regime))
            for _ in range(_STEPS):
                at = newton_step(at, prior, signals_NGX, happened_NG, own_NG)
            return at

        both = jax.tree.map(lambda *x: jnp.stack(x), of_regime(0), of_regime(1))
        return replace(
            self,
            rounds_B=jnp.zeros_like(self.rounds_B),
            shared_BRX=jnp.broadcast_to(both.shared_X, self.shared_BRX.shape),
            places_BRG=jnp.broadcast_to(both.places_G, self.places_BRG.shape),
        )


def _signals(
    confidence: Float[Array, "*N G"], certainty: Float[Array, "*N G"]
) -> Float[Array, "*N G 3"]:
    """x of every draft."""
    x = jnp.stack([confidence, certainty, jnp.ones_like(confidence)], axis=-1)
    return jnp.clip(x, -_LARGEST_SIGNAL, _LARGEST_SIGNAL)
