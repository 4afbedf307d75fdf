"""Adjusted logits from their definition: one row, one token at a time, in NumPy.

What the compiled round's `adjusted_logits` is audited against. The two share no code:
here is a list of tokens and a loop.
"""

from collections.abc import Collection, Sequence

import numpy as np

from jaxspark.decoding import Adjustment


def adjusted_by_definition(
    logits_V: np.ndarray,
    prompt: Sequence[int],
    output: Sequence[int],
    adjustment: Adjustment,
    stop_ids: Sequence[int] = (),
) -> np.ndarray:
    """The logits of the token after `output`; see `jaxspark.decoding.adjustments`."""
    z_V = np.array(logits_V, np.float64)
    for token in range(len(z_V)):
        if adjustment.allowed_ids is not None and token not in adjustment.allowed_ids:
            z_V[token] = -np.inf
    for *first, last in adjustment.bad_words:
        if list(output[len(output) - len(first) :]) == first:
            z_V[last] = -np.inf
    if len(output) < adjustment.min_tokens:
        z_V[list(stop_ids)] = -np.inf
    for token, bias in adjustment.logit_bias.items():
        z_V[token] += bias
    for token in {*prompt, *output}:
        factor = adjustment.repetition_penalty
        z_V[token] = z_V[token] / factor if z_V[token] > 0 else z_V[token] * factor
    for token in output:
        z_V[token] -= adjustment.frequency_penalty
    for token in set(output):
        z_V[token] -= adjustment.presence_penalty
    return z_V


def masked_by_definition(
    adjusted_V: np.ndarray, logits_V: np.ndarray, allowed: Collection[int]
) -> np.ndarray:
    """Logits of the tokens that a grammar allows; see `decoding.grammar_masks`.

    Where everything else that was done to them leaves none, they are the model's own.
    """
    z_V = np.full(len(logits_V), -np.inf)
    for token in allowed:
        z_V[token] = adjusted_V[token]
    if np.all(z_V == -np.inf):
        for token in allowed:
            z_V[token] = logits_V[token]
    return z_V
