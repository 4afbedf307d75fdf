"""`jaxspark audit --suite=greedy` and `gumbel`: token by token, on real prompts."""

import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from jaxspark.checkpoints import Target
from jaxspark.decoding import parse_schedule
from jaxspark.decoding.couplings import Coupling
from jaxspark.exactness.audit import AuditResult, plain_outputs
from jaxspark.exactness.audit_grid import Cell, cells, run_cell, sampled_requests
from jaxspark.exactness.audit_models import audited_drafter
from jaxspark.exactness.suites.report import found, total
from jaxspark.generation import Request
from jaxspark.generation.generate import round_capacity
from jaxspark.progress import CellProgress, bars

MAX_PROMPT_TOKENS = 384


@dataclass(frozen=True, kw_only=True)
class TokenGrid:
    """What a suite tries on which prompts.

    Attributes:
      drafters: see `audited_drafter`.
      block_lengths: drafts per round.
      slots: batch sizes; larger ones mix temperatures.
      schedules: that take turns; those that the suite's coupling allows.
      prompts_per_domain: prompts of each domain.
      max_new_tokens: output budget.
      full: whether every cell has every prompt, not its share alone.
      max_prompts: at most this many prompts per cell; None: all of its share.
    """

    drafters: tuple[str, ...] = (
        "ngram",
        "dspark-vanilla",
        "dspark-gated",
        "dspark-rnn",
        "dflash",
    )
    block_lengths: tuple[int, ...] = tuple(range(1, 9))
    slots: tuple[int, ...] = (1, 5)
    schedules: tuple[str, ...] = ("fixed",)
    prompts_per_domain: int = 20
    max_new_tokens: int = 128
    full: bool = False
    max_prompts: int | None = None

    def check(self, target: Target) -> None:
        """Raises ValueError for drafters and schedules that there are not."""
        for name in self.drafters:
            audited_drafter(name, target)
        for name in self.schedules:
            parse_schedule(name)

    def recorded(self) -> dict[str, Any]:
        """The grid as progress files keep it."""
        kept = asdict(self) | {
            "slots": list(map(str, self.slots)),
            "most": self.max_prompts,
        }
        del kept["prompts_per_domain"], kept["max_prompts"]
        return kept


def audit_tokens(
    console: Console,
    target: Target,
    requests: Sequence[Request],
    suite: str,
    grid: TokenGrid,
    *,
    progress_file: str | None,
    prompts_dir: str | None,
) -> dict:
    """The greedy or gumbel suite over a grid.

    Args:
      console: where tables, bars and differences are printed.
      target: a loaded target.
      requests: greedy ones.
      suite: "greedy" or "gumbel".
      grid: what is tried on them.
      progress_file: JSON lines that a stopped audit goes on from; None keeps none.
      prompts_dir: where the prompts are from, which must not change meanwhile.

    Returns:
      Its figures.
    """
    coupling: Coupling = "rejection" if suite == "greedy" else "gumbel"
    if suite == "gumbel":
        requests = sampled_requests(requests)
    todo = list(
        cells(
            grid.drafters,
            grid.block_lengths,
            grid.slots,
            len(requests),
            schedules=[
                name
                for name in grid.schedules
                if coupling in parse_schedule(name).couplings
            ],
            full=grid.full,
            most=grid.max_prompts,
        )
    )
    settings = {
        "suite": suite,
        "target": target.name,
        "dtype": jnp.dtype(target.model.dtype).name,
        "prompts": len(requests),
        "prompts_dir": prompts_dir,
        **grid.recorded(),
    }
    finished = CellProgress(progress_file and f"{progress_file}.{suite}", settings)
    capacity = round_capacity(
        MAX_PROMPT_TOKENS + grid.max_new_tokens + max(grid.block_lengths)
    )
    with bars(console) as progress:
        bar = progress.add_task("plain decoding", total=len(requests))
        for request in requests:
            if request.name not in finished.plain:
                [tokens] = plain_outputs(
                    target, [request], coupling=coupling, capacity=capacity
                )
                finished.add({"plain": request.name, "tokens": tokens})
            progress.advance(bar)
        plain = [finished.plain[request.name] for request in requests]

        def run(cell: Cell) -> tuple[Cell, AuditResult, float]:
            begin = time.perf_counter()
            result = run_cell(
                target,
                audited_drafter(cell.drafter, target),
                cell,
                requests,
                plain,
                coupling=coupling,
                capacity=capacity,
            )
            return cell, result, time.perf_counter() - begin

        bar = progress.add_task(suite, total=len(todo))
        missing = [cell for cell in todo if cell.name not in finished.cells]
        progress.advance(bar, len(todo) - len(missing))
        # A cell is compiled, on one core, while another is decoded.
        at_once = 2 if jax.default_backend() == "cpu" else 1
        for group in itertools.batched(missing, 2 * at_once):
            with ThreadPoolExecutor(at_once) as pool:
                for done in as_completed([pool.submit(run, cell) for cell in group]):
                    cell, result, seconds = done.result()
                    finished.add(_entry(cell, result, seconds))
                    for difference in result.differences:
                        line = f"{cell.name}: {difference}"
                        if settings["dtype"] != "float32":
                            line = line.replace("VIOLATION", "difference")
                        progress.console.print(line)
                    progress.advance(bar)
            # Cells share few programs, and memory maps per process are limited.
            jax.clear_caches()
    return _summary(console, settings, list(finished.cells.values()))


def _entry(cell: Cell, result: AuditResult, seconds: float) -> dict:
    return {
        "cell": cell.name,
        "drafter": cell.drafter,
        "block_length": cell.block_length,
        "slots": cell.slots,
        "schedule": cell.schedule,
        "rounds": result.rounds,
        "seconds": round(seconds, 1),
        **found(result),
    }


def _summary(console: Console, settings: dict, entries: list[dict]) -> dict:
    dtype = settings["dtype"]
    table = Table(title=f"{settings['suite']} · {settings['target']} · {dtype}")
    # The guarantees are for float32; coarser rounding is measured, not judged.
    judged = dtype == "float32"
    for column in ("drafter", "slots", "outputs", "tokens", "accepted length",
                   "near-ties", "violations" if judged else "differences"):  # fmt: skip
        table.add_column(column, justify="right")
    groups: dict[tuple, list[dict]] = {}
    for entry in entries:
        groups.setdefault((entry["drafter"], entry["slots"]), []).append(entry)
    for (drafter, slots), group in groups.items():
        tokens, rounds = total(group, "tokens"), total(group, "rounds")
        table.add_row(
            drafter,
            str(slots),
            str(total(group, "outputs")),
            str(tokens),
            f"{tokens / max(rounds, 1):.2f}",
            str(total(group, "near_ties")),
            str(total(group, "violations")),
        )
    console.print(table)
    tokens, ties = total(entries, "tokens"), total(entries, "near_ties")
    figures = {
        **settings,
        "tokens": tokens,
        "near_ties": ties,
        "near_ties_per_10000": 1e4 * ties / max(tokens, 1),
        "violations": total(entries, "violations"),
        "cells": entries,
    }
    if judged:
        console.print(
            f"{tokens} tokens audited: {figures['violations']} violations, "
            f"{ties} near-ties ({figures['near_ties_per_10000']:.2f} in 10,000)"
        )
    else:
        parted = ties + figures.pop("violations")
        figures["parted_per_10000"] = 1e4 * parted / max(tokens, 1)
        console.print(
            f"{dtype}: {parted} outputs part from plain decoding "
            f"({figures['parted_per_10000']:.1f} in 10,000 tokens)"
        )
    return figures
