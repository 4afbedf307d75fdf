"""`jaxspark audit --suite=prefix`: guarantee 4, a cache hit changes nothing."""

from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jaxspark.drafters import Drafter
from jaxspark.exactness.audit import AuditResult
from jaxspark.exactness.prefix import (
    AUDITED,
    FEW_PAGES,
    NEW,
    Hit,
    PrefixAudit,
    alignments,
    audited_pair,
)
from jaxspark.exactness.suites.cells import run_cells
from jaxspark.exactness.suites.report import found, summary, total
from jaxspark.exactness.tiny_models import Family
from jaxspark.progress import CellProgress

SEQUENCES = 300
# Chunks that divide a page, are one, and hold several.
CHUNKS = (32, 128, 256)
# What hits may change of how much is accepted.
TOLERANCE = 0.02


# What is audited of every drafter, each in a cell of its own.
PARTS = ("hits", "sequences")


def prefix_cells() -> list[tuple[Family, str, str]]:
    """Every family, drafter and part; those that take longest first."""
    cells = [
        (family, name, part)
        for part in PARTS
        for family, names in AUDITED.items()
        for name in names
    ]
    return sorted(cells, key=lambda cell: cell[0] == "dense")


def audit_prefix(console: Console, *, progress_file: str | None = None) -> dict:
    """Cold starts against hits, and random sequences against plain decoding.

    Args:
      console: where tables, bars and differences are printed.
      progress_file: JSON lines that a stopped audit goes on from; None keeps none.

    Returns:
      Its figures.
    """
    finished = CellProgress(
        progress_file and f"{progress_file}.prefix",
        {"suite": "prefix", "sequences": SEQUENCES, "chunks": CHUNKS},
    )
    cells = {_name(*cell): cell for cell in prefix_cells()}
    entries = run_cells(console, "prefix", cells, _run, finished)
    table = Table(title="prefix cache · cold against hits, random sequences")
    for column in ("target", "drafter", "what", "outputs", "of them cached", "rounds",
                   "preempted", "tokens", "near-ties", "violations"):  # fmt: skip
        table.add_column(column, justify="right")
    for entry in entries:
        shown = ("family", "drafter", "part", "outputs", "cached", "rounds")
        figures = [str(entry[column]) for column in (*shown, "preempted")]
        counts = (total([entry], k) for k in ("tokens", "near_ties", "violations"))
        table.add_row(*figures, *map(str, counts))
    console.print(table)
    return summary(entries)


def _name(family: Family, drafter: str, part: str) -> str:
    return f"{family} · {drafter} · {part}"


def _run(family: Family, drafter: str, part: str) -> dict:
    target, made = audited_pair(family, drafter)
    figures = (_hits if part == "hits" else _sequences)(target, made)
    jax.clear_caches()
    return {
        "cell": _name(family, drafter, part),
        "family": family,
        "drafter": drafter,
        "part": part,
        **figures,
    }


def _hits(target: Any, drafter: Drafter) -> dict:
    """All alignments by the first chunk, of the others a share."""
    window = getattr(target.config, "sliding_window", 16)
    cases = list(enumerate(alignments((window,))))
    hits: list[Hit] = []
    for turn, chunk in enumerate(CHUNKS):
        audit = PrefixAudit(target, drafter, chunk=chunk)
        for seed, case in cases if not turn else cases[turn::12]:
            hits += audit.hits(case, seed)
    cold, hit = (sum(each.rounds[i] for each in hits) for i in (0, 1))
    wrong = [difference for each in hits for difference in each.differences]
    if abs(hit - cold) > TOLERANCE * cold:
        wrong.append(f"{cold} rounds cold, {hit} with hits")
    return {
        "outputs": len(hits),
        "cached": sum(each.cached > 0 for each in hits),
        "rounds": f"{cold}, {hit}",
        "preempted": 0,
        "tokens": NEW * len(hits),
        "near_ties": [],
        "violations": wrong,
    }


def _sequences(target: Any, drafter: Drafter) -> dict:
    """This drafter's share of the sequences."""
    audit = PrefixAudit(target, drafter, pages=FEW_PAGES)
    share = -(-SEQUENCES // sum(map(len, AUDITED.values())))
    result, preempted = AuditResult(), 0
    lost: list[str] = []
    for seed in range(share):
        outputs, times, missing = audit.sequence(seed)
        result += outputs
        preempted += times
        lost += [f"sequence {seed}: {each}" for each in missing]
    figures = found(result)
    return {
        **figures,
        "cached": audit.pages.hit_requests,
        "rounds": result.rounds,
        "preempted": preempted,
        "violations": lost + figures["violations"],
    }
