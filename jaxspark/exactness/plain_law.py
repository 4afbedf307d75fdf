"""The law of plain decoding on a tiny vocabulary, worked out one prefix at a time."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxspark.decoding.sampling import Sampling, warp
from jaxspark.exactness.wanted import Wanted
from jaxspark.models import FlatTokens
from jaxspark.settings import standard_settings

LogProbs = dict[tuple[int, ...], np.ndarray]


@standard_settings()
def sequence_log_probs(
    target,
    prompt: Sequence[int],
    length: int,
    sampling: Sampling,
    wanted: Wanted = Wanted(),
) -> LogProbs:
    """Adjusted and warped log p of the next token after every continuation, plainly.

    Returns a table {continuation of `prompt`, shorter than `length`: log p [V]}.
    """
    vocab = target.config.vocab_size
    table: LogProbs = {}
    for n in range(length):
        prefixes = list(itertools.product(range(vocab), repeat=n))
        rows = jnp.array([[*prompt, *prefix] for prefix in prefixes], jnp.int32)
        logits_BV = np.asarray(_next_logits(target, rows))
        adjusted_BV = [
            wanted.adjusted(logits_V, row, len(prompt) - wanted.output)
            for logits_V, row in zip(logits_BV, rows.tolist())
        ]
        own = sampling.at(jnp.zeros((len(rows),), jnp.int32))
        log_p_BV = warp(jnp.array(adjusted_BV, jnp.float32), own)
        table |= dict(zip(prefixes, np.asarray(log_p_BV, np.float64)))
    return table


@jax.jit
def _next_logits(target, rows_BQ) -> Float[Array, "B V"]:
    slots, width = rows_BQ.shape
    begin_B = jnp.zeros((slots,), jnp.int32)
    tokens = FlatTokens.from_rows(rows_BQ, begin_B, jnp.full_like(begin_B, width))
    x_TD, _, _ = target(tokens, target.init_cache(slots, width))
    return target.logits(x_TD).reshape(slots, width, -1)[:, -1]


def target_distribution(table: LogProbs) -> np.ndarray:
    """The target's own distribution of the next tokens, [V, ..., V]."""
    length = 1 + max(map(len, table))
    joint = np.zeros((len(table[()]),) * length)
    for tokens in np.ndindex(joint.shape):
        joint[tokens] = np.exp(sum(table[tokens[:n]][tokens[n]] for n in range(length)))
    return joint
