"""Progress of long commands, and of audits and sweeps that go on where they stopped."""

from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID, TimeElapsedColumn

from jaxspark.jsonlines import JsonLines, check_settings

# Least seconds between two lines in logs.
LINE_S = 30.0


def bars(console: Console | None = None, *, transient: bool = False) -> Progress:
    """Progress bars with the time that is left and the time that went.

    In files and logs of pods, where no bar can move, a line is printed now and then.
    """
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    return _Bars(*columns, console=console, transient=transient)


class _Bars(Progress):
    """Bars that are lines where there is no terminal."""

    def __init__(self, *columns: Any, **options: Any):
        super().__init__(*columns, **options)
        self._told = self.get_time()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Tells of it too, if nothing was told for a while."""
        super().advance(task_id, advance)
        self._tell(task_id)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Likewise."""
        super().update(task_id, **changes)
        self._tell(task_id)

    def _tell(self, task_id: TaskID) -> None:
        now = self.get_time()
        if self.console.is_terminal or now - self._told < LINE_S:
            return
        self._told, task = now, self._tasks[task_id]
        if task.total is None or task.elapsed is None or task.finished:
            return
        line = (
            f"{task.description}: {task.completed:.0f} of {task.total:.0f} in "
            f"{timedelta(seconds=round(task.elapsed))}"
        )
        if task.time_remaining is not None:
            line += f", {timedelta(seconds=round(task.time_remaining))} to go"
        self.console.print(line, markup=False, highlight=False)


class CellProgress:
    """Finished cells and plain outputs by name, kept in a file if there is one."""

    def __init__(self, path: str | None, settings: dict):
        self.lines = None
        self.plain: dict[str, list[int]] = {}
        self.cells: dict[str, dict] = {}
        if path:
            check_settings(f"{path}.settings", settings)
            self.lines = JsonLines(path)
            for entry in self.lines.entries:
                self._remember(entry)

    def _remember(self, entry: dict) -> None:
        if "plain" in entry:
            self.plain[entry["plain"]] = entry["tokens"]
        else:
            self.cells[entry["cell"]] = entry

    def add(self, entry: dict) -> None:
        """Remembers one plain output or one finished cell."""
        self._remember(entry)
        if self.lines is not None:
            self.lines.add(entry)
