"""What suites of `verify` and `draft_sampling` share: draws in float64."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from scipy.special import logsumexp

from jaxspark.decoding.sampling import Stream, keys, position_noise
from pallas_kernels import Rows

# Greedy, nearly so, as usual, and far beyond.
TEMPERATURES = (0.0, 1e-37, 0.7, 1.0, 2.5, 3e38)


def simulated(implementation):
    """Kernels run in memory in which what was never written is NaN."""
    if implementation == "xla":
        return nullcontext()
    return pltpu.force_tpu_interpret_mode(
        pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    )


def rows_of(count, *, noisy=True):
    """Rows of all temperatures, and the noise that `sampling` has for them."""
    seeds, positions = jnp.arange(count, dtype=jnp.uint32), 3 + jnp.arange(count)
    words_R2 = jax.random.key_data(keys(Stream.NOISE, seeds, positions))
    temperature_R = jnp.asarray(np.resize(TEMPERATURES, count), jnp.float32)
    rows = Rows(temperature_R, words_R2.view(jnp.int32) if noisy else None)

    def noise(ids_V):
        if not noisy:
            return np.zeros((count, len(ids_V)))
        noise_RV = np.asarray(position_noise(seeds, positions, ids_V), np.float64)
        return np.where(temperature_R[:, None] > 0, noise_RV, 0)

    return rows, noise


def check(draws, z_RV, rows, noise_RV, rtol=1e-5):
    """Everything that draws say of logits in float64."""
    temperature_R = np.asarray(rows.temperature_R, np.float64)
    rate_R1 = 1 / np.where(temperature_R > 0, temperature_R, 1)[:, None]
    score_RV = (z_RV - z_RV.max(1, keepdims=True)) * rate_R1 + noise_RV
    place_R = score_RV.argmax(1)
    row_R = np.arange(len(z_RV))

    def close(seen, expected, name):
        np.testing.assert_allclose(
            np.asarray(seen), expected, rtol=rtol, atol=rtol, err_msg=name
        )

    assert draws.place_R.tolist() == place_R.tolist()
    close(draws.logit_R, z_RV[row_R, place_R], "logit")
    log_p_RV = z_RV * rate_R1 - logsumexp(z_RV * rate_R1, axis=1, keepdims=True)
    # Of tokens that have some probability at their temperature.
    log_p_R = np.maximum(log_p_RV[row_R, place_R], -1e4)
    seen_R = draws.log_prob(draws.logit_R, rows.rate_R)
    close(np.maximum(seen_R, -1e4), log_p_R, "log-probability")
    if draws.whole_R is not None:
        model_R = z_RV[row_R, place_R] - logsumexp(z_RV, axis=1)
        close(draws.model_log_prob(draws.logit_R), model_R, "the model's")
        return
    p_RV = np.exp(log_p_RV)
    close(draws.entropy(), -(p_RV * np.maximum(log_p_RV, -1e4)).sum(1), "entropy")
    others_RV = score_RV.copy()
    others_RV[row_R, place_R] = -np.inf
    odds_R = score_RV.max(1) - logsumexp(others_RV, axis=1)
    close(np.minimum(draws.odds(rows.rate_R), 20), np.minimum(odds_R, 20), "odds")
