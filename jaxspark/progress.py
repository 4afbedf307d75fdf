"""Progress of long commands, and of audits and sweeps that go on where they stopped."""

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from jaxspark.jsonlines import JsonLines, check_settings


def bars(console: Console, *, transient: bool = False) -> Progress:
    """Progress bars with the time that is left and the time that went."""
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=transient)


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
