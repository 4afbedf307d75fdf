"""What timelines of requests say: speed, waits, and their percentiles."""

from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np

from jaxspark.benchmark.serving.client import Timeline

PERCENTILES = (50, 90, 99)


def figures_of(runs: Sequence[Sequence[Timeline]]) -> dict[str, Any]:
    """Figures of some runs of one load against one server.

    `tokens_per_second` is the median of the runs; waits are those of all runs together:

      first_seconds: from asking to the first text.
      between_seconds: from text to text, as clients see it. Tokens that come together
        are one arrival, so that no pause is averaged away.
      per_token_seconds: an answer's time after its first text, by its other tokens.
      whole_seconds: from asking to the end.
    """
    speeds = [speed for run in runs if (speed := tokens_per_second(run)) is not None]
    told = [each for run in runs for each in run]
    good = [each for each in told if each.error is None and each.arrivals]
    many = [each for each in good if each.output_tokens > 1]
    gaps = [b - a for each in good for a, b in pairwise(each.arrivals)]
    return {
        "tokens_per_second": median(speeds) if speeds else float("nan"),
        "runs": speeds,
        "requests": len(told),
        "errors": sorted({each.error for each in told if each.error is not None}),
        "failed": len(told) - len(good),
        "prompt_tokens": _mean([each.prompt_tokens for each in good]),
        "output_tokens": _mean([each.output_tokens for each in good]),
        "first_seconds": percentiles([e.arrivals[0] - e.sent for e in good]),
        "between_seconds": percentiles(gaps),
        "per_token_seconds": percentiles(
            [(e.arrivals[-1] - e.arrivals[0]) / (e.output_tokens - 1) for e in many]
        ),
        "whole_seconds": percentiles([e.ended - e.sent for e in good]),
    }


def tokens_per_second(run: Sequence[Timeline]) -> float | None:
    """Of all answers together, from the first question to the last answer."""
    good = [each for each in run if each.error is None]
    if not good:
        return None
    seconds = max(e.ended for e in good) - min(e.sent for e in run)
    return sum(each.output_tokens for each in good) / seconds


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Those that are reported, by name; NaN where there are no values."""
    found = np.percentile(values, PERCENTILES) if len(values) else [float("nan")] * 3
    return {str(p): float(value) for p, value in zip(PERCENTILES, found)}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
