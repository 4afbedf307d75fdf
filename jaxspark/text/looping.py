"""Looping outputs: easy to draft, worthless to read, so figures are given without."""

from collections.abc import Sequence

import numpy as np

WINDOW = 64
LONGEST_PERIOD = 16


def is_looping(tokens: Sequence[int]) -> bool:
    """Whether the last 64 tokens repeat a period of at most 16 tokens."""
    tail = np.asarray(tokens[-WINDOW:])
    if len(tail) < WINDOW:
        return False
    return any(
        np.array_equal(tail[period:], tail[:-period])
        for period in range(1, LONGEST_PERIOD + 1)
    )
