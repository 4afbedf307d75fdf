"""What audits tell: entries of their cells, tables of checks."""

from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from jaxspark.exactness.audit import AuditResult
from jaxspark.exactness.rejection import Check


def found(result: AuditResult) -> dict:
    """What every entry of an audit tells."""
    return {
        "outputs": result.outputs,
        "tokens": result.tokens,
        "near_ties": [str(each) for each in result.near_ties],
        "violations": [str(each) for each in result.violations],
    }


def total(entries: list[dict], key: str) -> int:
    """Sum over entries, of numbers or of list lengths."""
    return sum(len(e[key]) if isinstance(e[key], list) else e[key] for e in entries)


def summary(entries: list[dict], checks: dict | None = None) -> dict:
    """Figures of a suite: its cells' entries, and what `checked` returned, if any."""
    checks = checks or {"violations": 0, "checks": []}
    return {
        "violations": total(entries, "violations") + checks["violations"],
        "near_ties": total(entries, "near_ties"),
        "tokens": total(entries, "tokens"),
        "checks": checks["checks"],
        "cells": entries,
    }


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
