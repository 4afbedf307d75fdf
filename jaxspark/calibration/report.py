"""Tables of calibrations and cost profiles."""

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxspark.calibration.profile import CostProfile
from jaxspark.calibration.variants import VARIANTS

# What an estimator forecast, learning on the way, beside what was fitted.
LEARNED = "learned"


def report_reliability(console: Console, title: str, figures: dict) -> None:
    """The tables of one sampling temperature."""
    names = ("before", *VARIANTS, LEARNED)
    for measure, text in (("ece", "calibration error"), ("auc", "ranking (AUC)")):
        table = Table(title=f"{title} · {text}")
        for column in ("draft", "survived", *names):
            table.add_column(column, justify="right", no_wrap=True)
        columns = [figures[name][measure] for name in names]
        for k, row in enumerate(zip(*columns)):
            survived = f"{figures['before']['survived'][k]:.3f}"
            table.add_row(str(k + 1), survived, *(f"{each:.3f}" for each in row))
        table.add_section()
        table.add_row("", "", *(f"{np.mean(column):.3f}" for column in columns))
        console.print(table)


def report_costs(console: Console, profile: CostProfile) -> None:
    """The table of one number of slots."""
    setting, costs = profile.setting, profile.costs
    table = Table(
        title=f"{setting.slots} slots · {setting.block_length} drafts · "
        f"{setting.capacity} positions · {setting.device}"
    )
    table.add_column("drafts", justify="right")
    table.add_column("tokens", justify="right")
    table.add_column("ms", justify="right")
    table.add_column("against plain", justify="right")
    plain = costs.curve_for(0).seconds[0]
    for curve in costs.curves:
        for size, seconds in zip(curve.sizes, curve.seconds):
            ratio = f"{seconds / plain:.2f}x"
            table.add_row(
                str(curve.draft_length), str(size), f"{1e3 * seconds:.1f}", ratio
            )
    console.print(table)
