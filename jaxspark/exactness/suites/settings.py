"""`jaxspark audit --suite=settings`: the quick audit under global JAX settings."""

import functools
from concurrent.futures import as_completed

import jax
from rich.console import Console
from rich.table import Table

from jaxspark.exactness import rejection_under_schedules
from jaxspark.exactness.audit_schedules import (
    ScheduleAudit,
    ScheduleCell,
    grid_of_schedules,
)
from jaxspark.exactness.global_settings import SETTINGS, Setting, audit_setting
from jaxspark.exactness.suites.report import checked, found, summary, total
from jaxspark.exactness.suites.schedules import QUICK, few_optimizations
from jaxspark.exactness.workers import collect, compile_workers
from jaxspark.progress import bars

# Guarantee 2 is at stake where a setting chooses how random numbers are made.
SAMPLED = [name for name in SETTINGS if "prng" in name or "threefry" in name]
SAMPLES = 20_000


def audit_settings(console: Console) -> dict:
    """Tokens and distributions under every setting, on tiny models."""
    cells = grid_of_schedules(every=QUICK)
    jitted = [name for name, setting in SETTINGS.items() if not setting.eager]
    eager = [name for name, setting in SETTINGS.items() if setting.eager]
    with few_optimizations(), bars(console) as progress, compile_workers() as workers:
        # The settings of a cell share what is compiled, so they share a worker.
        auditing = [workers.submit(_run_cell, eager, cells[0])]
        auditing += [workers.submit(_run_cell, jitted, cell) for cell in cells]
        checking = [workers.submit(_sample, name) for name in SAMPLED]
        entries = []
        bar = progress.add_task("settings", total=len(auditing))
        for future in as_completed(auditing):
            entries += future.result()
            progress.advance(bar)
        by_setting = collect(progress, checking, "distributions")
    table = Table(title="global settings · tiny models")
    for column in ("setting", "cells", "tokens", "near-ties", "violations"):
        table.add_column(column, justify="right")
    for name in SETTINGS:
        group = [entry for entry in entries if entry["setting"] == name]
        figures = (total(group, key) for key in ("tokens", "near_ties", "violations"))
        table.add_row(name, str(len(group)), *map(str, figures))
    console.print(table)
    for entry in entries:
        for difference in entry["violations"]:
            console.print(f"{entry['setting']}, {entry['cell']}: {difference}")
    checks = [check for each in by_setting for check in each]
    sampled = checked(console, "rejection sampling under global settings", checks)
    return summary(entries, sampled)


@functools.cache
def _audit(rounding: Setting | None) -> ScheduleAudit:
    """Models, requests and plain outputs; under a setting if that changes rounding."""
    if rounding is None:
        return ScheduleAudit()
    with rounding.applied():
        return ScheduleAudit()


def _run_cell(names: list[str], cell: ScheduleCell) -> list[dict]:
    entries = []
    for name in names:
        setting = SETTINGS[name]
        audit = _audit(setting if setting.rounds else None)
        result = audit_setting(audit, setting, cell)
        entries.append({"setting": name, "cell": cell.name, **found(result.audit)})
    jax.clear_caches()
    return entries


def _sample(name: str) -> list[rejection_under_schedules.Check]:
    schedule = rejection_under_schedules.schedules_for_rejection()["lagged"]
    with SETTINGS[name].applied():
        return rejection_under_schedules.frequency_checks(
            SAMPLES, {f"lagged, {name}": schedule}
        )
