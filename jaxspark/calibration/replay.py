"""What an estimator would have forecast, had it learned from recorded rounds."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxspark.calibration.rounds import Rounds
from jaxspark.decoding import Estimator
from jaxspark.decoding.estimator import EstimatorState
from jaxspark.settings import standard_settings

DEFAULT = Estimator()


@standard_settings()
def replayed(
    rounds: Rounds,
    *,
    sampled: bool,
    estimator: Estimator = DEFAULT,
    slots: int = 1,
) -> tuple[Float[np.ndarray, "N G"], EstimatorState]:
    """Logits of acceptance, each by what was known before its round.

    Args:
      rounds: in the order they happened.
      sampled: whether their requests were not greedy.
      estimator: what learns.
      slots: rounds that are taken to have happened at once.

    Returns:
      The logits, and what was learned in the end.
    """
    count, block = rounds.confidence_NG.shape
    # The last ones are filled up with rounds in which nothing was judged.
    missing = -count % slots

    def by_time(x):
        padded = np.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)])
        return jnp.asarray(padded.reshape(-1, slots, *x.shape[1:]))

    sampled_B = jnp.full((slots,), sampled)

    def step(state: EstimatorState, seen):
        confidence_BG, certainty_BG, judged_B, accepted_B = seen
        logits_BG = state.logits(confidence_BG, certainty_BG, sampled_B)
        state = state.observed(
            estimator,
            confidence_BG=confidence_BG,
            certainty_BG=certainty_BG,
            sampled_B=sampled_B,
            judged_B=judged_B,
            accepted_B=accepted_B,
        )
        return state, logits_BG

    seen = (
        by_time(rounds.confidence_NG.astype(np.float32)),
        by_time(rounds.certainty_NG.astype(np.float32)),
        by_time(rounds.judged_N.astype(np.int32)),
        by_time(rounds.accepted_N.astype(np.int32)),
    )
    state, logits = jax.jit(lambda state: jax.lax.scan(step, state, seen))(
        estimator.empty(slots, block)
    )
    return np.asarray(logits).reshape(-1, block)[:count], state


def without_head(rounds: Rounds, line: tuple[float, float]) -> Rounds:
    """The rounds as a drafter without a confidence head would have them.

    Args:
      rounds: of any drafter; what it drafts does not depend on its head.
      line: what certainty suggests, `couplings.ODDS` or `couplings.NEGENTROPY`.
    """
    slope, intercept = line
    return replace(rounds, confidence_NG=slope * rounds.certainty_NG + intercept)
