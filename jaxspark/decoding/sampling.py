"""Per-slot sampling: warped distributions and the randomness that drives them.

A slot's distribution is its logits after temperature, top-k, top-p and min-p, in that
order. Temperature 0 is the limit: all mass on the best token (ties: the lowest id), so
greedy decoding is no special case further down.

Randomness is a function of the request's seed and of absolute positions alone, never of
the batch, so a request gives the same tokens wherever and beside whomever it runs. But
for rejection sampling with a schedule: there others decide where rounds begin, and it
is the distribution that stays.
"""

from dataclasses import dataclass
from enum import IntEnum

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxspark.parallel import vocabulary
from jaxspark.parallel.axes import MODEL, size
from jaxspark.settings import random_key, standard_settings
from pallas_kernels.gumbel import gumbel


class Stream(IntEnum):
    """Independent uses of a request's randomness."""

    NOISE = 0  # the Gumbel vector owned by an output position
    DRAFT = 1
    ACCEPT = 2
    CORRECT = 3


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of B slots (or of T rows, see `at`).

    Attributes:
      temperature: 0 is greedy.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the smallest set of most likely tokens with this mass; 1 keeps all.
      min_p: keep tokens at least this likely relative to the best; 0 keeps all.
      seed: of the request's randomness.

    Tokens tied at a threshold are kept together.
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    seed: UInt[Array, " B"]

    @classmethod
    @standard_settings()
    def of(cls, slots: int, *, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0):
        """Checked parameters for `slots`; each a number or one number per slot.

        One seed for all gives all slots the same random stream.

        Raises:
          ValueError: a value outside its range, or a list of another length.
        """

        def column(name, value, dtype, low, high):
            values = np.asarray(value)
            if values.shape not in ((), (slots,)):
                raise ValueError(
                    f"{name} must be one number or {slots} numbers (one per prompt), "
                    f"got shape {values.shape}"
                )
            if not np.all((values >= low) & (values <= high)):
                raise ValueError(f"{name} must lie in [{low}, {high}], got {value}")
            if np.issubdtype(dtype, np.integer) and np.any(values != np.floor(values)):
                raise ValueError(f"{name} must be whole, got {value}")
            return jnp.asarray(np.broadcast_to(values, (slots,)).astype(dtype))

        finite = float(np.finfo(np.float32).max)
        if np.any(np.asarray(top_p) == 0):
            raise ValueError("top_p must be positive, got 0")
        return cls(
            temperature=column("temperature", temperature, np.float32, 0.0, finite),
            top_k=column("top_k", top_k, np.int32, 0, 2**31 - 1),
            top_p=column("top_p", top_p, np.float32, 0.0, 1.0),
            min_p=column("min_p", min_p, np.float32, 0.0, 1.0),
            seed=column("seed", seed, np.uint32, 0, 2**32 - 1),
        )

    def at(self, slots_T: Int[Array, " T"]) -> "Sampling":
        """The parameters of each row's slot (padding -1 reads the last slot's)."""
        return jax.tree.map(lambda values_B: values_B[slots_T], self)

    @property
    def greedy(self) -> Bool[Array, " B"]:
        """Which slots take the best token."""
        return self.temperature == 0

    @property
    def filtered(self) -> Bool[Array, " B"]:
        """Which slots leave tokens out."""
        return (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)


@standard_settings()
def warp(logits_RV: Float[Array, "R V"], sampling: Sampling) -> Float[Array, "R V"]:
    """Log-probabilities each row samples from; -inf outside its support."""
    log_p_RV = vocabulary.log_softmax(_tempered(logits_RV, sampling))
    log_p_RV = jax.lax.cond(
        jnp.any(sampling.filtered),
        _filter,
        lambda log_p_RV, _: log_p_RV,
        log_p_RV,
        sampling,
    )
    best_R1 = vocabulary.argmax(logits_RV)[:, None]
    is_best_RV = vocabulary.places(logits_RV.shape[-1]) == best_R1
    return or_best(log_p_RV, is_best_RV, sampling.greedy[:, None])


def warped_at(
    logits_RV: Float[Array, "R V"],
    sampling: Sampling,
    row_N: Int[Array, "*N"],
    token_N: Int[Array, "*N"],
) -> Float[Array, "*N"]:
    """What `warp` has at some tokens; written out only where rows are filtered."""

    def filtered():
        return vocabulary.pick(warp(logits_RV, sampling), row_N, token_N)

    def whole():
        tempered_RV = _tempered(logits_RV, sampling)
        norm_R = vocabulary.logsumexp(tempered_RV)
        log_p_N = vocabulary.pick(tempered_RV, row_N, token_N) - norm_R[row_N]
        is_best_N = vocabulary.argmax(logits_RV)[row_N] == token_N
        return or_best(log_p_N, is_best_N, sampling.greedy[row_N])

    return jax.lax.cond(jnp.any(sampling.filtered), filtered, whole)


def or_best(
    log_p: Float[Array, "..."], is_best: Bool[Array, "..."], greedy: Bool[Array, "..."]
) -> Float[Array, "..."]:
    """Log-probabilities; where greedy, all mass is on the best token."""
    return jnp.where(greedy, jnp.where(is_best, 0.0, -jnp.inf), log_p)


def _tempered(logits_RV, sampling):
    """Divided by each row's temperature; shifted first, lest tiny ones overflow."""
    temperature_R = jnp.where(sampling.greedy, 1.0, sampling.temperature)
    shifted_RV = logits_RV - vocabulary.maximum(logits_RV)
    return shifted_RV / temperature_R[:, None]


def _filter(log_p_RV, sampling):
    """top-k, top-p and min-p as thresholds on the probability."""
    p_RV = jnp.exp(log_p_RV)
    vocab = p_RV.shape[-1] * size(MODEL)
    top_k_R = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocab), vocab)
    by_rank_R = _largest_threshold(p_RV, jnp.ones_like(p_RV), top_k_R)
    ranked_RV = jnp.where(p_RV >= by_rank_R[:, None], p_RV, 0.0)
    mass_R = sampling.top_p * vocabulary.sums(ranked_RV)
    by_mass_R = _largest_threshold(ranked_RV, ranked_RV, mass_R)
    by_mass_R = jnp.where(sampling.top_p < 1, by_mass_R, 0.0)
    best_R = vocabulary.maximum(p_RV)[:, 0]
    by_best_R = sampling.min_p * best_R
    threshold_R = jnp.maximum(jnp.maximum(by_rank_R, by_mass_R), by_best_R)
    # The best token always stays, also where a tiny top_p rounds to nothing.
    threshold_R = jnp.minimum(threshold_R, best_R)
    kept_RV = jnp.where(p_RV >= threshold_R[:, None], log_p_RV, -jnp.inf)
    return vocabulary.log_softmax(kept_RV)


def _largest_threshold(p_RV, weight_RV, goal_R):
    """Largest t with sum of weights where p >= t at least the goal, per row.

    Bisection over the bit patterns of float32, which order like the numbers: exact in
    31 passes, where a sort of the vocabulary costs far more on every platform.
    """
    bits_RV = jax.lax.bitcast_convert_type(p_RV, jnp.int32)
    low_R = jnp.zeros(p_RV.shape[:1], jnp.int32)
    high_R = jnp.full_like(low_R, np.float32(1.0).view(np.int32) + 1)

    def halve(_, bounds):
        low_R, high_R = bounds
        middle_R = (low_R + high_R) // 2
        above_RV = bits_RV >= middle_R[:, None]
        enough_R = vocabulary.sums(jnp.where(above_RV, weight_RV, 0)) >= goal_R
        return jnp.where(enough_R, middle_R, low_R), jnp.where(
            enough_R, high_R, middle_R
        )

    low_R, _ = jax.lax.fori_loop(0, 31, halve, (low_R, high_R))
    return jax.lax.bitcast_convert_type(low_R, jnp.float32)


@standard_settings()
def keys(stream: Stream, seed_R: UInt[Array, " R"], *indices_R: Int[Array, " R"]):
    """One PRNG key per row from its seed, the stream and any indices."""

    def key(seed, *indices):
        key = jax.random.fold_in(random_key(seed), stream)
        for index in indices:
            key = jax.random.fold_in(key, index)
        return key

    return jax.vmap(key)(seed_R, *indices_R)


@standard_settings()
def position_noise(
    seed_R: UInt[Array, " R"], positions_R: Int[Array, " R"], ids_W: Int[Array, " W"]
) -> Float[Array, "R W"]:
    """Of the Gumbel noise vector that an output position owns, what some tokens have.

    Plain sampling, the draft and the verification all take argmax(log-prob + this).
    """
    return _noise(keys(Stream.NOISE, seed_R, positions_R), ids_W)


@standard_settings()
def categorical(keys_R, log_p_RV: Float[Array, "R V"]) -> Int[Array, " R"]:
    """One sample per row; entries at -inf are never drawn."""
    noise_RV = _noise(keys_R, vocabulary.places(log_p_RV.shape[-1]))
    return vocabulary.argmax(log_p_RV + noise_RV)


def _noise(keys_R, ids_W: Int[Array, " W"]) -> Float[Array, "R W"]:
    words_R2 = key_words(keys_R)
    return gumbel(words_R2[:, :1], words_R2[:, 1:], ids_W)


def key_words(keys_R) -> Int[Array, "R 2"]:
    """Keys as `pallas_kernels.gumbel` takes them."""
    return jax.lax.bitcast_convert_type(jax.random.key_data(keys_R), jnp.int32)
