"""Plots of drafters, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

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
