"""`jaxspark bench --suite=load`: throughput against the number of requests at once.

For every concurrency: no speculation (without any drafter), blocks of every fixed
length, and the schedule, in turn, on the same prompts, sampled. A run is some rounds
with all slots busy; what scheduling remembers goes on from run to run, as it does in a
server. The schedule's costs are measured first, its temperatures come with the drafter.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxspark.benchmark.prefilled import Contestant, PrefilledBatch
from jaxspark.benchmark.sequences import TimingOptions
from jaxspark.calibration.files import load_calibration
from jaxspark.calibration.measuring import measured_with_progress
from jaxspark.checkpoints import load_drafter
from jaxspark.checkpoints.folders import sha256
from jaxspark.checkpoints.load import drafter_folder
from jaxspark.configuration import option
from jaxspark.decoding import Calibration, DecodeOptions, Lagged
from jaxspark.decoding.options import check_block_length
from jaxspark.drafters import Drafter, PlainDrafter
from jaxspark.progress import CellProgress, bars


@dataclass(frozen=True, kw_only=True)
class LoadOptions(TimingOptions):
    """How throughput is measured."""

    concurrency: tuple[int, ...] = option(
        "Requests at once.", (1, 2, 4, 8, 16, 32, 64), at_least=1
    )
    fixed_lengths: tuple[int, ...] = option(
        "Fixed lengths, each drafted so.", (1, 2, 3, 4, 5, 7), at_least=1
    )
    load_prompts: int = option(
        "Prompts that few requests at once take in turns.", 12, at_least=1
    )
    load_block: int = option("Drafts the schedule chooses from.", 4, at_least=1)
    load_rounds: int = option("Rounds of each run.", 16, at_least=1)
    load_temperature: float = option(
        "Sampling temperature of --suite=load.", 1.0, at_least=0
    )


def bench_load(
    console: Console,
    target,
    draft: str,
    prompts: Sequence[Sequence[int]],
    options: LoadOptions,
    *,
    progress_file: str | None,
    settings: dict,
    on_figures: Callable[[dict], None],
) -> dict:
    """Tokens per second by concurrency, and what was verified for them.

    Args:
      console: where tables and bars are printed.
      target: a loaded target.
      draft: the drafter's name, as for `load_drafter`; it must be calibrated.
      prompts: token ids, of all domains in turn.
      options: how it is measured.
      progress_file: JSON lines that a stopped sweep goes on from; None keeps none.
      settings: what figures of another time must agree in, to stand beside new ones.
      on_figures: called with all figures whenever there are more.

    Raises:
      ValueError: the drafter or its calibration has no such blocks.
    """
    drafter = load_drafter(draft, target)
    calibration = load_calibration(draft, "rejection")
    for length in (options.load_block, *options.fixed_lengths):
        check_block_length(drafter, length)
    calibration.check(options.load_block, "rejection")
    folder, _ = drafter_folder(draft)
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")])
    settings = settings | {"files": [sha256(file) for file in files]}
    finished = CellProgress(progress_file, settings)
    figures = {}
    for slots in map(str, options.concurrency):
        if slots not in finished.cells:
            found = _at_concurrency(
                console,
                target.model,
                drafter,
                int(slots),
                prompts,
                calibration,
                options,
            )
            finished.add({"cell": slots, "found": found})
            # None of the programs is used again, and all hold memory.
            jax.clear_caches()
        figures[slots] = finished.cells[slots]["found"]
        _report(console, draft, figures)
        on_figures(figures)
    return figures


def _at_concurrency(
    console: Console,
    model,
    drafter: Drafter,
    slots: int,
    prompts: Sequence[Sequence[int]],
    calibration: Calibration,
    options: LoadOptions,
) -> dict:
    """All contestants with one number of requests.

    Few requests are too few prompts to compare by: small batches come in numbers.
    """
    count = -(-min(options.load_prompts, len(prompts)) // slots)
    everyone = cycle(prompts)
    batches = [
        PrefilledBatch(
            model,
            drafter,
            list(islice(everyone, slots)),
            rounds=options.load_rounds,
            capacity=options.capacity,
            temperature=options.load_temperature,
        )
        for _ in range(count)
    ]
    profile = measured_with_progress(
        model,
        drafter,
        console=console,
        slots=slots,
        block_length=options.load_block,
        capacity=options.capacity,
        temperature=options.load_temperature,
    )
    contestants = {
        "none": Contestant(
            PlainDrafter(), DecodeOptions(block_length=0, buckets=(slots,))
        )
    }
    for length in options.fixed_lengths:
        contestants[f"fixed {length}"] = Contestant(
            drafter, DecodeOptions(block_length=length)
        )
    contestants["scheduled"] = Contestant(
        drafter,
        DecodeOptions(
            block_length=options.load_block,
            calibration=calibration,
            schedule=Lagged(costs=profile.costs),
        ),
    )
    with bars(console) as progress:
        title = f"{slots} requests: decoding in turn"
        bar = progress.add_task(title, total=(options.repeats + 1) * len(batches))
        for each in contestants.values():
            each.warm_up(batches[0])
        for run in range(options.repeats + 1):
            totals = {name: np.zeros(4) for name in contestants}
            # A run takes a second or two, and machines change their pace: taking
            # turns at every batch keeps the contestants' conditions alike.
            for batch in batches:
                for name, each in contestants.items():
                    totals[name] += each.run(batch, run)
                progress.advance(bar)
            for name, each in contestants.items():
                each.runs.append(totals[name])
    return {name: each.figures() for name, each in contestants.items()} | {
        "costs": asdict(profile.costs)
    }


def _report(console: Console, draft: str, figures: dict) -> None:
    """The table so far."""
    table = Table(title=f"{draft} · tokens/s by requests at once")
    names = [name for name in next(iter(figures.values())) if name != "costs"]
    for column in ("requests", *names, "against best", "verified per slot"):
        table.add_column(column, justify="right")
    for slots, each in figures.items():
        rates = {name: each[name]["tokens_per_second"] for name in names}
        best = max(rate for name, rate in rates.items() if name != "scheduled")
        verified = each["scheduled"]["verified_tokens_per_slot"]
        table.add_row(
            slots,
            *(f"{rate:.1f}" for rate in rates.values()),
            f"{rates['scheduled'] / best:.2f}x",
            f"{verified:.2f}",
        )
    console.print(table)
