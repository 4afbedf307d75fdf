"""Tables of what a drafter was measured to gain, and means over domains."""

from rich.console import Console
from rich.table import Table

from jaxspark.evaluation.acceptance import macro_average
from jaxspark.evaluation.thresholds import Sweep


def averaged(domains: list[dict]) -> dict:
    """The mean over domains of every figure that has one."""
    numbers = [name for name, value in domains[0].items() if isinstance(value, float)]
    average = {
        name: macro_average([figures[name] for figures in domains]) for name in numbers
    }
    columns = zip(*(figures["conditional_acceptance"] for figures in domains))
    return average | {"conditional_acceptance": list(map(macro_average, columns))}


def report(console: Console, title: str, domains: dict) -> None:
    """The table for people."""
    table = Table(title=title)
    titles = {
        "accepted_length": "accepted length",
        "accepted_length_non_looping": "not looping",
        "conditional_acceptance": "accepted at place 1, 2, ...",
        "tokens_per_second": "tokens/s",
        "plain_tokens_per_second": "plain",
    }
    shown = {key: title for key, title in titles.items() if key in domains["average"]}
    table.add_column("")
    for title in shown.values():
        table.add_column(title, justify="right")
    for name, figures in domains.items():
        table.add_row(name, *(_text(figures[key]) for key in shown))
    console.print(table)


def _text(value) -> str:
    if isinstance(value, list):
        return " ".join(f"{each:.2f}" for each in value)
    return f"{value:.2f}"


def report_thresholds(console: Console, draft: str, found: Sweep) -> None:
    """The table of a sweep."""
    table = Table(title=f"{draft} · accepted per verified draft (verified)")
    table.add_column("survival")
    for name in found:
        table.add_column(name, justify="right")
    for threshold in next(iter(found.values())):
        cells = (each[threshold] for each in found.values())
        table.add_row(
            f"{threshold:g}",
            *(
                f"{c['acceptance_rate']:.3f} ({c['verified_length']:.2f})"
                for c in cells
            ),
        )
    console.print(table)
