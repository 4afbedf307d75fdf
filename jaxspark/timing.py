"""Timing by alternation: several things run in turn, medians compared.

Machines are shared and drift; a ratio of medians of interleaved runs holds where two
separate measurements do not.
"""

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter

import jax


def alternate(
    contestants: Mapping[str, Callable[[], float]], repeats: int
) -> dict[str, list[float]]:
    """Runs each contestant once unrecorded, then all in turn `repeats` times.

    A contestant returns its own seconds, so that it can leave out its preparation.
    """
    for run in contestants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            seconds[name].append(run())
    return seconds


def timed(function: Callable, *arguments) -> Callable[[], float]:
    """A contestant: the seconds of one call, until its arrays are there."""

    def run():
        begin = perf_counter()
        jax.block_until_ready(function(*arguments))
        return perf_counter() - begin

    return run


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Median of each contestant's runs."""
    return {name: median(runs) for name, runs in seconds.items()}
