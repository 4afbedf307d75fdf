"""`jaxspark audit --suite=schedules`: all guarantees under every schedule.

And `--suite=parameters`: the same, for requests that do to their logits all that a
request may do, and want to know what is likely.
"""

import contextlib
import functools
import itertools
import time
from collections.abc import Iterator
from concurrent.futures import as_completed
from dataclasses import asdict

import jax
from rich.console import Console
from rich.table import Table

from jaxspark.exactness import (
    estimated_rounds,
    parameters,
    rejection_under_schedules,
)
from jaxspark.exactness.appendix import appendix_checks
from jaxspark.exactness.audit_schedules import (
    ScheduleAudit,
    ScheduleCell,
    ScheduleResult,
    grid_of_schedules,
)
from jaxspark.exactness.rejection import Check
from jaxspark.exactness.suites.report import checked, found, summary, total
from jaxspark.exactness.tiny_models import DRAFTERS, Family
from jaxspark.exactness.told import parted
from jaxspark.exactness.workers import collect, compile_workers
from jaxspark.progress import CellProgress, bars

# One cell in so many: of --suite=quick, and of --suite=all, which ends in half an hour.
QUICK, HALF = 14, 2
# And of --suite=parameters where it is run beside others.
FEW = 6
# What log-probabilities may differ by, since products with more rows round otherwise.
TOLD_ERROR = 1e-4
# Compiled programs hold memory maps, of which a process may have but so many: cells
# between two clearings, and those that this process has run.
AT_ONCE: dict[Family, int] = {"dense": 40, "deepseek_v4": 15}
_cells_run = itertools.count(1)


def audit_schedules(
    console: Console,
    *,
    every: int = 1,
    family: Family = "dense",
    samples: int = 200_000,
    progress_file: str | None = None,
    adjusted: bool = False,
) -> dict:
    """All guarantees under every schedule, on tiny models.

    Most of the time goes into compiling programs that run for a moment, so they are
    compiled with few optimizations; the other suites have them all.

    Args:
      console: where tables, bars and differences are printed.
      every: runs one cell of the grid in so many; `QUICK` has fewer checks too.
      family: of the tiny models.
      samples: of the chi-square tests; a quick audit has fewer.
      progress_file: JSON lines that a stopped audit goes on from; None keeps none.
      adjusted: audits requests that adjust their logits.

    Returns:
      Its figures.
    """
    suite = "parameters" if adjusted else "schedules"
    finished = CellProgress(
        progress_file and f"{progress_file}.{suite}",
        {"suite": suite, "every": every, "family": family},
    )
    with few_optimizations():
        return _audit_schedules(console, every, family, samples, finished, adjusted)


@contextlib.contextmanager
def few_optimizations() -> Iterator[None]:
    """Programs compiled inside, by workers too, run once and compile sooner."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def _audit_schedules(
    console: Console,
    every: int,
    family: Family,
    samples: int,
    finished: CellProgress,
    adjusted: bool,
) -> dict:
    grid, quick = grid_of_schedules(every=every, family=family), every == QUICK
    todo = [cell for cell in grid if cell.name not in finished.cells]
    own = ("hybrid-asks",) if quick else DRAFTERS[family]
    drafters = (rejection_under_schedules.LEAKY, *own)
    lawful = rejection_under_schedules.schedules_for_rejection()
    schedules = ("causal", "lagged") if quick else tuple(lawful)
    samples = 20_000 if quick else samples

    with bars(console) as progress, compile_workers() as workers:
        bar = progress.add_task("schedules", total=len(grid))
        progress.advance(bar, len(grid) - len(todo))
        cells = {
            workers.submit(_run_cell, family, adjusted, cell): cell for cell in todo
        }
        checking = [
            workers.submit(_enumerate, family, adjusted, name) for name in drafters
        ]
        if adjusted:
            checking.append(workers.submit(_by_definition, family))
            checking += [
                workers.submit(parameters.frequency_checks, samples, [name], family)
                for name in DRAFTERS[family]
            ]
        else:
            checking += [
                workers.submit(_sample, family, name, samples) for name in schedules
            ]
            checking.append(workers.submit(appendix_checks))
            checking += [
                workers.submit(_two_rounds, family, name)
                for name in estimated_rounds.DRAFTERS[family]
            ]
        for future in as_completed(cells):
            cell, (result, seconds) = cells[future], future.result()
            counts = {
                "rounds": result.rounds,
                "drafted": result.drafted,
                "verified": result.verified,
                "seconds": round(seconds, 1),
                "told_error": result.told_error,
            }
            entry = {"cell": cell.name, **asdict(cell), **counts}
            finished.add(entry | found(result.audit))
            for difference in result.audit.differences:
                progress.console.print(f"{cell.name}: {difference}")
            progress.advance(bar)
        distributions = collect(progress, checking, "distributions")
    entries = [finished.cells[cell.name] for cell in grid]
    title = "parameters" if adjusted else "schedules"
    table = Table(title=f"{title} · tiny models · {family}")
    for column in ("schedule", "coupling", "cells", "outputs", "tokens", "drafted",
                   "verified", "near-ties", "violations"):  # fmt: skip
        table.add_column(column, justify="right")
    groups: dict[tuple, list[dict]] = {}
    for entry in entries:
        groups.setdefault((entry["schedule"], entry["coupling"]), []).append(entry)
    for names, group in groups.items():
        drafted, rounds = total(group, "drafted"), total(group, "rounds")
        table.add_row(
            *names,
            str(len(group)),
            str(total(group, "outputs")),
            str(total(group, "tokens")),
            f"{100 * drafted / rounds:.0f} %",
            f"{total(group, 'verified') / max(drafted, 1):.2f}",
            str(total(group, "near_ties")),
            str(total(group, "violations")),
        )
    console.print(table)
    console.print(
        f"{len(entries)} cells, {total(entries, 'tokens')} tokens audited: "
        f"{total(entries, 'violations')} violations"
    )
    checks = [_choice(names, group) for names, group in groups.items()]
    if adjusted:
        checks.append(_told(max(entry["told_error"] for entry in entries)))
    checks += [check for each in distributions for check in each]
    enumerated = checked(console, f"{title} with rejection sampling", checks)
    return summary(entries, enumerated)


@functools.cache
def _audit(family: Family, adjusted: bool) -> ScheduleAudit:
    """Models, requests and their plain outputs: of a worker, for all its cells."""
    return ScheduleAudit(family=family, adjusted=adjusted)


def _run_cell(
    family: Family, adjusted: bool, cell: ScheduleCell
) -> tuple[ScheduleResult, float]:
    audit = _audit(family, adjusted)
    begin = time.perf_counter()
    result = audit.run(cell)
    seconds = time.perf_counter() - begin
    if next(_cells_run) % AT_ONCE[family] == 0:
        jax.clear_caches()
    return result, seconds


def _enumerate(family: Family, adjusted: bool, drafter: str) -> list[Check]:
    module = parameters if adjusted else rejection_under_schedules
    checks = module.enumeration_checks([drafter], family=family)
    jax.clear_caches()
    return checks


def _by_definition(family: Family) -> list[Check]:
    """Whether plain decoding itself does what the definition says."""
    audit, checks = _audit(family, True), []
    for (mix, coupling), plain in audit.plain.items():
        asked = [
            (request, each.tokens)
            for request, each in zip(audit.mixes[mix], plain)
            if coupling == "gumbel" or request.params.temperature == 0
        ]
        places = len(list(parted(audit.target, *zip(*asked))))
        checks.append(
            Check(
                name=f"plain decoding by definition, {mix}, {coupling}: tokens",
                figure=places,
                bound="= 0",
                holds=not places,
            )
        )
    return checks


def _told(error: float) -> Check:
    return Check(
        name="log-probabilities against plain decoding's",
        figure=error,
        bound=f"<= {TOLD_ERROR:g}",
        holds=error <= TOLD_ERROR,
    )


def _sample(family: Family, name: str, samples: int) -> list[Check]:
    schedule = rejection_under_schedules.schedules_for_rejection()[name]
    return rejection_under_schedules.frequency_checks(samples, {name: schedule}, family)


def _two_rounds(family: Family, drafter: str) -> list[Check]:
    lawful = rejection_under_schedules.schedules_for_rejection()
    checks = estimated_rounds.enumeration_checks(drafter, lawful, family)
    jax.clear_caches()
    return checks


def _choice(names: tuple[str, str], group: list[dict]) -> Check:
    """A schedule that never chose would prove nothing."""
    drafted, rounds = total(group, "drafted"), total(group, "rounds")
    verified = total(group, "verified") / max(drafted, 1)
    weighs = names[0].startswith(("causal", "lagged", "free"))
    return Check(
        name=f"{' · '.join(names)}: rounds that draft, {verified:.2f} verified",
        figure=drafted / rounds,
        bound="in (0, 1)" if weighs else "= 1",
        holds=(0 < drafted < rounds if weighs else drafted == rounds) and verified > 0,
    )
