"""Cells of a suite, run by workers; a stopped suite goes on from a file."""

from collections.abc import Callable, Mapping
from concurrent.futures import as_completed
from typing import Any

from rich.console import Console

from jaxspark.exactness.suites.schedules import few_optimizations
from jaxspark.exactness.workers import compile_workers
from jaxspark.progress import CellProgress, bars


def run_cells(
    console: Console,
    title: str,
    cells: Mapping[str, tuple[Any, ...]],
    run: Callable[..., dict],
    finished: CellProgress,
    *,
    devices: int = 1,
) -> list[dict]:
    """What `run` says of each cell, in their order.

    Args:
      console: where a bar and differences are printed.
      title: of the bar.
      cells: what `run` is called with, by the name under which it answers.
      run: a function of a module, which workers find by name.
      finished: cells that are not run again; gets the others.
      devices: virtual ones of each worker.
    """
    todo = [cell for name, cell in cells.items() if name not in finished.cells]
    with (
        few_optimizations(),
        bars(console) as progress,
        compile_workers(devices) as workers,
    ):
        bar = progress.add_task(title, total=len(cells))
        progress.advance(bar, len(cells) - len(todo))
        for future in as_completed([workers.submit(run, *cell) for cell in todo]):
            entry = future.result()
            finished.add(entry)
            for difference in entry["violations"] + entry["near_ties"]:
                progress.console.print(f"{entry['cell']}: {difference}")
            progress.advance(bar)
    return [finished.cells[name] for name in cells]
