"""Tables of what a model weighs."""

from rich.console import Console
from rich.table import Table

from jaxspark.simulation.footprint import Footprint


def report(console: Console, name: str, weighed: Footprint) -> None:
    """The tables."""
    table = Table(title=f"{name} · parameters")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    for part, count in weighed.parameters.items():
        table.add_row(part, f"{count:,}")
    table.add_section()
    table.add_row("total", f"{weighed.total:,}")
    table.add_row("active per token", f"{weighed.active:,}")
    console.print(table)
    table = Table(title="cache")
    for column in ("storage", "part", "bytes per token"):
        table.add_column(column, justify="right" if column[0] == "b" else "left")
    for storage, parts in weighed.cache.items():
        for part, size in parts.items():
            table.add_row(storage, part, f"{size:,.1f}")
        table.add_row(storage, "total", f"{sum(parts.values()):,.1f}")
        table.add_row(storage, "per request", f"{weighed.state[storage]:,} in all")
        table.add_section()
    console.print(table)
    table = Table(title="operations per token")
    for column in ("context", "GFLOP", "of which attention"):
        table.add_column(column, justify="right")
    for context, flops in weighed.flops.items():
        share = 1 - 2 * weighed.active / flops
        table.add_row(f"{context:,}", f"{flops / 1e9:,.1f}", f"{100 * share:.1f} %")
    console.print(table)
