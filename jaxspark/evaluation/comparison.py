"""Drafters evaluated alike, in one table and one plot."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from jaxspark.evaluation.plots import plot_acceptance, plot_lines

# Suites over a number are drawn over it (Figures 3 and 4), the others by position.
NUMBERS = {"depth": "draft layers", "block": "block length"}
# Greedy outputs loop; lengths without them say more.
LENGTH = "accepted_length_non_looping"


def report(console: Console, suite: str, results: dict[str, dict]) -> None:
    """The table of all variants."""
    table = Table(title=f"{suite}: accepted length")
    table.add_column(suite)
    temperatures = list(next(iter(results.values())))
    for temperature in temperatures:
        for domain in ("math", "code", "chat", "average"):
            table.add_column(f"{domain}, {temperature}", justify="right")
    table.add_column("tokens/s", justify="right")
    for variant, figures in results.items():
        cells = []
        for each in figures.values():
            rows = [*each["domains"].values(), each["macro_average"]]
            cells += [f"{row[LENGTH] or float('nan'):.2f}" for row in rows]
        speed = figures[temperatures[0]]["macro_average"].get("tokens_per_second")
        table.add_row(variant, *cells, f"{speed:.1f}" if speed else "")
    console.print(table)


def draw(path: Path, suite: str, results: dict[str, dict]) -> None:
    """Accepted length over a number, or conditional acceptance by position."""
    temperatures = list(next(iter(results.values())))
    if suite in NUMBERS:
        lines = {
            f"temperature {temperature}": {
                float(variant): each[temperature]["macro_average"][LENGTH]
                for variant, each in results.items()
            }
            for temperature in temperatures
        }
        plot_lines(path, lines, xlabel=NUMBERS[suite], ylabel="accepted length")
        return
    averages = {
        v: each[temperatures[0]]["macro_average"] for v, each in results.items()
    }
    curves = {
        variant: [rate or 0.0 for rate in average["conditional_acceptance"]]
        for variant, average in averages.items()
    }
    plot_acceptance(path, curves)
