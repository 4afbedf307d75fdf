"""Plots of drafters, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

_SIZE = (5.2, 3.4)


def _figure():
    # Imported here: decoding must not need it.
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "plots need the package matplotlib: pip install 'jaxspark[train]'"
        ) from None

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure, path: str | Path) -> None:
    """Writes a plot; of the processes of a job the first one does."""
    if jax.process_index():
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def plot_acceptance(
    path: str | Path, curves: Mapping[str, Sequence[float]], *, title: str = ""
) -> None:
    """Conditional acceptance by place in the block, one line per drafter (Figure 2)."""
    figure, axes = _figure()
    for name, rates in curves.items():
        axes.plot(np.arange(1, len(rates) + 1), rates, marker="o", ms=4, label=name)
    longest = max(map(len, curves.values()))
    axes.set(
        xlabel="place in the block",
        ylabel="accepted, given all before",
        xticks=range(1, longest + 1),
        ylim=(0, 1),
        title=title,
    )
    axes.legend(frameon=False)
    _save(figure, path)


def plot_lines(
    path: str | Path,
    lines: Mapping[str, Mapping[float, float]],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
) -> None:
    """One line per drafter over depth, block length or the like (Figures 3 and 4)."""
    figure, axes = _figure()
    for name, points in lines.items():
        axes.plot(points.keys(), points.values(), marker="o", ms=4, label=name)
    ticks = sorted({x for points in lines.values() for x in points})
    axes.set(xlabel=xlabel, ylabel=ylabel, xticks=ticks, title=title)
    axes.legend(frameon=False)
    _save(figure, path)


def plot_reliability(
    path: str | Path, curves: Mapping[str, Sequence[Mapping]], *, title: str = ""
) -> None:
    """What was forecast against what happened, one panel per draft (Figure 6).

    Args:
      path: PNG file.
      curves: for each way of forecasting the `Reliability` of every draft, as a dict.
      title: of the figure.
    """
    figure, _ = _figure()
    figure.clear()
    drafts = max(map(len, curves.values()))
    columns = min(drafts, 4)
    rows = -(-drafts // columns)
    figure.set_size_inches(2.2 * columns, 2.3 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for k, axes in enumerate(panels.flat):
        if k >= drafts:
            axes.set_visible(False)
            continue
        axes.plot((0, 1), (0, 1), color="0.7", lw=1)
        for name, each in curves.items():
            axes.plot(
                each[k]["forecast"], each[k]["happened"], marker="o", ms=3, label=name
            )
        axes.set_title(f"draft {k + 1}", fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(frameon=False, fontsize="small")
    figure.supxlabel("forecast survival", fontsize="small")
    figure.supylabel("survived", fontsize="small")
    figure.suptitle(title)
    _save(figure, path)


def plot_load(path: str | Path, figures: Mapping[str, Mapping], *, title="") -> None:
    """Throughput and verified tokens by requests at once (Figures 7 and 8).

    Args:
      path: PNG file.
      figures: by number of requests what `jaxspark bench --suite=load` found.
      title: of the figure.
    """
    figure, _ = _figure()
    figure.clear()
    figure.set_size_inches(2 * _SIZE[0], _SIZE[1])
    speed, budget = figure.subplots(1, 2)
    requests = [int(slots) for slots in figures]
    names = [name for name in next(iter(figures.values())) if name != "costs"]
    for name in names:
        rates = [each[name]["tokens_per_second"] for each in figures.values()]
        plain = [each["none"]["tokens_per_second"] for each in figures.values()]
        style = {"lw": 2.5, "color": "black"} if name == "scheduled" else {"lw": 1}
        speed.plot(
            requests, np.divide(rates, plain), marker="o", ms=3, label=name, **style
        )
    scheduled = [each["scheduled"] for each in figures.values()]
    for key, label in (
        ("verified_tokens_per_slot", "verified"),
        ("accepted_length", "accepted length"),
    ):
        points = [each[key] for each in scheduled]
        budget.plot(requests, points, marker="o", ms=4, label=label)
    speed.set(ylabel="throughput against no speculation")
    budget.set(ylabel="tokens per slot and round, scheduled")
    for axes in (speed, budget):
        axes.set(xlabel="requests at once", xscale="log", xticks=requests)
        axes.set_xticks(requests, map(str, requests), minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    figure.suptitle(title)
    _save(figure, path)


def plot_serving(path: str | Path, figures: Mapping[str, Mapping]) -> None:
    """Speed, and what people wait for, by load and server.

    Args:
      path: PNG file.
      figures: by load and server what `jaxspark bench --suite=serving` found.
    """
    figure, _ = _figure()
    figure.clear()
    figure.set_size_inches(2.4 * _SIZE[0], _SIZE[1])
    panels = figure.subplots(1, 3)
    loads = range(len(figures))
    for number, name in enumerate(next(iter(figures.values()))):
        found = [each[name] for each in figures.values()]
        speeds = [each["tokens_per_second"] for each in found]
        panels[0].plot(loads, speeds, marker="o", ms=4, label=name)
        for axes, key in ((panels[1], "first_seconds"), (panels[2], "between_seconds")):
            for percentile, style in (("50", "-"), ("99", ":")):
                waits = [each[key][percentile] for each in found]
                label = f"{name}, {percentile} %"
                axes.plot(
                    *(loads, waits),
                    **{"ls": style, "color": f"C{number}", "marker": "o", "ms": 4},
                    label=label,
                )
    titles = ("tokens/s", "seconds to the first text", "seconds between texts")
    for axes, title in zip(panels, titles):
        axes.set_xticks(loads, figures, rotation=30, ha="right", fontsize="small")
        axes.set_title(title, fontsize="medium")
        axes.set_yscale("linear" if axes is panels[0] else "log")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    _save(figure, path)


def plot_frontier(path: str | Path, found: Mapping[str, Mapping]) -> None:
    """Throughput of all users against the speed of one, a panel per machine.

    Args:
      path: PNG file.
      found: by machine and policy what `simulate` gave for each number of users.
    """
    figure, _ = _figure()
    figure.clear()
    figure.set_size_inches(_SIZE[0] * len(found), _SIZE[1] * 1.2)
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (title, policies) in zip(panels, found.items()):
        for name, points in policies.items():
            scheduled = name.endswith("scheduled")
            axes.plot(
                [each.user_speed for each in points.values()],
                [each.throughput for each in points.values()],
                marker="o",
                ms=3,
                label=name,
                **({"lw": 2.5, "color": "black"} if scheduled else {"lw": 1}),
            )
        axes.set(
            xlabel="tokens/s of one user",
            ylabel="tokens/s of all users",
            yscale="log",
            title=f"{title}\n(simulated)",
        )
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize="small")
    _save(figure, path)
