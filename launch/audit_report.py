"""What long runs share: progress that can be resumed, tables of checks."""

from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from jaxspark.evaluation.audit import AuditResult
from jaxspark.evaluation.sampling_checks import Check
from jaxspark.jsonlines import JsonLines, same_settings


class AuditProgress:
    """Plain outputs and finished cells by name, kept in a file if there is one."""

    def __init__(self, path: str | None, settings: dict):
        self.lines = None
        self.plain: dict[str, list[int]] = {}
        self.cells: dict[str, dict] = {}
        if path:
            same_settings(f"{path}.settings", settings)
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


def found(result: AuditResult, seconds: float) -> dict:
    """What every entry of an audit tells."""
    return {
        "outputs": result.outputs,
        "tokens": result.tokens,
        "near_ties": [str(each) for each in result.near_ties],
        "violations": [str(each) for each in result.violations],
        "seconds": round(seconds, 1),
    }


def total(entries: list[dict], key: str) -> int:
    """Sum over entries, of numbers or of list lengths."""
    return sum(len(e[key]) if isinstance(e[key], list) else e[key] for e in entries)


def checked(console: Console, title: str, checks: list[Check]) -> dict:
    """Prints a table of checks; returns the figures."""
    table = Table(title=title)
    for column in ("check", "figure", "bound", "holds"):
        table.add_column(column)
    for check in checks:
        table.add_row(
            check.name,
            f"{check.figure:.3g}",
            check.bound,
            "yes" if check.holds else "NO",
        )
    console.print(table)
    violations = sum(not check.holds for check in checks)
    console.print(f"{len(checks)} checks: {violations} violations")
    return {"violations": violations, "checks": [asdict(check) for check in checks]}
