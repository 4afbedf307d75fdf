"""Acceptance where only drafts of some survival are verified (the paper's Figure 5)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from jaxspark.decoding import Calibration, Threshold
from jaxspark.drafters import Drafter
from jaxspark.evaluation.acceptance import measure_acceptance
from jaxspark.evaluation.plots import plot_lines
from jaxspark.progress import bars

Sweep = dict[str, dict[float, dict[str, float]]]


def sweep_thresholds(
    console: Console,
    target,
    drafter: Drafter,
    domains: Mapping[str, Sequence[Sequence[int]]],
    thresholds: Sequence[float],
    calibration: Calibration | None,
    **options,
) -> Sweep:
    """Acceptance rate and verified length of every domain, by threshold.

    Args:
      console: where a bar is shown.
      target: a loaded target.
      drafter: whose drafts are counted.
      domains: prompts as token ids, by domain.
      thresholds: survival that a draft needs to be verified, each in turn.
      calibration: of the drafter's confidences.
      **options: of `measure_acceptance`.
    """
    found: Sweep = {name: {} for name in domains}
    with bars(console) as progress:
        for threshold in progress.track(
            thresholds, description="verifying by survival"
        ):
            measured = measure_acceptance(
                target,
                drafter,
                domains,
                schedule=Threshold(threshold),
                calibration=calibration,
                **options,
            )
            for name, each in measured.items():
                found[name][threshold] = {
                    "acceptance_rate": each.acceptance_rate,
                    "verified_length": each.verified_length,
                    "accepted_length": each.accepted_length,
                }
    return found


def plot_thresholds(path: str | Path, found: Sweep, *, title: str) -> None:
    """Acceptance rate over the threshold, a line per domain."""
    plot_lines(
        path,
        {
            name: {t: each["acceptance_rate"] for t, each in points.items()}
            for name, points in found.items()
        },
        xlabel="least survival verified",
        ylabel="accepted per verified draft",
        title=title,
    )
