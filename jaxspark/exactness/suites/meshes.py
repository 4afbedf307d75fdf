"""`jaxspark audit --suite=mesh`: the tokens of one device on meshes of eight."""

import functools

import jax
from rich.console import Console
from rich.table import Table

from jaxspark.exactness.audit_schedules import (
    MIXES,
    ScheduleAudit,
    ScheduleCell,
    grid_of_schedules,
)
from jaxspark.exactness.suites.cells import run_cells
from jaxspark.exactness.suites.report import found, summary, total
from jaxspark.exactness.tiny_models import DRAFTERS, FAMILIES, Family
from jaxspark.parallel.mesh import make_mesh
from jaxspark.progress import CellProgress

DEVICES = 8
MESHES = ("data:8", "expert:8", "data:2,expert:4", "data:2,expert:2,model:2")
# Two for each shard where there are most.
SLOTS = 16


def mesh_cells(family: Family) -> list[tuple[str, ScheduleCell]]:
    """Every drafter on every mesh; schedules, couplings and bucket sets take turns."""
    grid = grid_of_schedules(family=family)
    cells = []
    for d, drafter in enumerate(DRAFTERS[family]):
        own = [cell for cell in grid if cell.drafter == drafter]
        for m, mesh in enumerate(MESHES):
            # Neighbouring drafters and meshes meet other schedules.
            cells.append((mesh, own[(5 * d + 3 * m) % len(own)]))
    return cells


def audit_meshes(console: Console, *, progress_file: str | None = None) -> dict:
    """Tokens on meshes against plain decoding on one device, on tiny models.

    Args:
      console: where tables, bars and differences are printed.
      progress_file: JSON lines that a stopped audit goes on from; None keeps none.

    Returns:
      Its figures.
    """
    grid = [(family, *cell) for family in FAMILIES for cell in mesh_cells(family)]
    finished = CellProgress(
        progress_file and f"{progress_file}.mesh", {"suite": "mesh", "meshes": MESHES}
    )
    cells = {_name(*cell): cell for cell in grid}
    entries = run_cells(console, "meshes", cells, _run, finished, devices=DEVICES)
    table = Table(title=f"meshes of {DEVICES} devices · tiny models")
    for column in ("target", "mesh", "cells", "tokens", "near-ties", "violations"):
        table.add_column(column, justify="right")
    for family in FAMILIES:
        for mesh in MESHES:
            group = [e for e in entries if (e["family"], e["mesh"]) == (family, mesh)]
            figures = (total(group, k) for k in ("tokens", "near_ties", "violations"))
            table.add_row(family, mesh, str(len(group)), *map(str, figures))
    console.print(table)
    return summary(entries)


def _name(family: Family, mesh: str, cell: ScheduleCell) -> str:
    return f"{family} · {mesh} · {cell.name}"


@functools.cache
def _audit(family: Family) -> ScheduleAudit:
    return ScheduleAudit(family=family, slots=SLOTS, shards=DEVICES, adjusted=True)


def _run(family: Family, mesh: str, cell: ScheduleCell) -> dict:
    audit = _audit(family)
    with jax.set_mesh(make_mesh(mesh)):
        result = audit.run(cell, mixes=MIXES[1:])
    jax.clear_caches()
    return {
        "cell": _name(family, mesh, cell),
        "family": family,
        "mesh": mesh,
        **found(result.audit),
    }
