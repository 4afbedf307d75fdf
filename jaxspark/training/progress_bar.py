"""A progress bar for training, with plain lines where there is no terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def watched(console: Console, steps: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields what `train` calls with its metrics."""
    columns = (MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    described = TextColumn("{task.description}")
    with Progress(described, *columns, console=console) as progress:
        bar = progress.add_task("training", total=steps)

        def show(line: dict[str, Any]) -> None:
            text = None
            if "loss" in line:
                agree = " ".join(f"{rate:.2f}" for rate in line["agree"])
                text = (
                    f"loss {line['loss']:.3f} · accepted length "
                    f"{line['accepted_length']:.2f} · agree {agree}"
                )
            progress.update(bar, completed=line["step"], description=text)
            if "held_out" in line and not console.is_terminal:
                figures = line["held_out"]
                console.print(
                    f"step {line['step']}: held-out loss {figures['loss']:.3f}, "
                    f"accepted length {figures['accepted_length']:.3f}"
                )

        yield show
