"""`jaxspark bench --suite=estimator`: what learning acceptance on the way is worth.

Real rounds are recorded once, domain by domain, with every draft verified. Over those
of the test prompts, in the order they happened, survival is forecast in three ways: as
drafts come (with the drafter's head, and as if it had none), by what an estimator has
learned up to that round, and by an offline calibration fitted to other prompts. Then
the domains follow each other, and the offline calibration knows the first alone. Last,
the schedule is simulated with each forecast, at stated costs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.table import Table

from jaxspark.calibration.recorded_rounds import kept_rounds
from jaxspark.calibration.replay import replayed, without_head
from jaxspark.calibration.rounds import Rounds
from jaxspark.calibration.temperatures import assess_logits, fit_temperatures
from jaxspark.configuration import Configuration, option
from jaxspark.decoding import CostCurve, Costs, Fixed, Lagged
from jaxspark.decoding.costs import bucket_ladder, draft_ladder, within_ladder
from jaxspark.decoding.couplings import NEGENTROPY, ODDS, Coupling
from jaxspark.drafters import Drafter
from jaxspark.simulation.simulate import Load, Trace, simulate

_SLOTS = 16
# Seconds of a round beside those for what it verifies, of a draft of every slot, and of
# a verified token of every slot: where few requests share a machine, and where many do.
COSTS = {"light": (1.0, 0.02, 0.05), "heavy": (1.0, 0.02, 0.4)}


@dataclass(frozen=True, kw_only=True)
class EstimatorOptions(Configuration):
    """What is recorded."""

    rounds_dir: str = option(
        "Folder of the rounds that --suite=estimator records, and uses again.",
        "runs/estimator",
    )
    rounds_temperature: float = option(
        "Sampling temperature of these rounds.", 1.0, at_least=0
    )
    rounds_coupling: Coupling = option(
        "Their coupling.", "rejection", choices=("rejection", "gumbel")
    )
    rounds_tokens: int = option("New tokens of each of their prompts.", 80, at_least=1)


def bench_estimator(
    console: Console,
    target,
    drafter: Drafter,
    fit_prompts: Mapping[str, Sequence[Sequence[int]]],
    test_prompts: Mapping[str, Sequence[Sequence[int]]],
    options: EstimatorOptions,
) -> dict:
    """The figures, by what the drafter has: its own confidences, or none."""
    folder = Path(options.rounds_dir)
    folder.mkdir(parents=True, exist_ok=True)
    fit, test = (
        {
            domain: kept_rounds(
                console,
                folder,
                f"{part}_{domain}",
                target,
                drafter,
                prompts,
                temperature=options.rounds_temperature,
                coupling=options.rounds_coupling,
                max_new_tokens=options.rounds_tokens,
                slots=_SLOTS,
                # Fit and test draw other random numbers.
                seed=seed,
            )
            for domain, prompts in by_domain.items()
        }
        for part, by_domain, seed in (
            ("fit", fit_prompts, 0),
            ("test", test_prompts, 2**20),
        )
    )
    sampled = options.rounds_temperature > 0
    entropy = sampled and options.rounds_coupling == "rejection"
    line = NEGENTROPY if entropy else ODDS
    readings = {
        "own confidences": (fit, test),
        "without a head": (
            {name: without_head(each, line) for name, each in fit.items()},
            {name: without_head(each, line) for name, each in test.items()},
        ),
    }
    return {
        name: _figures(console, name, *both, sampled=sampled)
        for name, both in readings.items()
    }


def _figures(
    console: Console,
    name: str,
    fit: Mapping[str, Rounds],
    test: Mapping[str, Rounds],
    *,
    sampled: bool,
) -> dict:
    together, begins = joined(test.values()), np.cumsum([0, *map(len, test.values())])
    every = fit_temperatures(joined(fit.values()), biased=True, with_certainty=True)
    first = fit_temperatures(next(iter(fit.values())), biased=True, with_certainty=True)
    # Domains in turn, as where many ask at once.
    order_N = in_turn_by_length(begins)
    mixed = taken(together, order_N)
    online, _ = replayed(mixed, sampled=sampled)
    forecasts = {
        "as they are": mixed.confidence_NG,
        "learned": online,
        "calibrated": every.logits(mixed),
    }
    figures: dict = {
        "mixed": {way: _errors(mixed, each) for way, each in forecasts.items()}
    }
    drifting, _ = replayed(together, sampled=sampled)
    ways = {
        "as they are": together.confidence_NG,
        "learned": drifting,
        "calibrated on the first": first.logits(together),
    }
    figures["drift"] = {
        domain: {
            way: _errors(taken(together, part), each[part])
            for way, each in ways.items()
        }
        for domain, part in (
            (domain, np.arange(begin, end))
            for domain, begin, end in zip(test, begins, begins[1:])
        )
    }
    figures["simulated"] = _simulated(mixed, forecasts)
    _show(console, name, figures)
    return figures


def joined(rounds) -> Rounds:
    """Rounds one after the other; requests keep apart."""
    rounds = list(rounds)
    parts = {
        each.name: [getattr(part, each.name) for part in rounds]
        for each in fields(Rounds)
    }
    first = np.cumsum([0, *(part.request_N.max() + 1 for part in rounds)])
    parts["request_N"] = [x + begin for x, begin in zip(parts["request_N"], first)]
    return Rounds(**{name: np.concatenate(each) for name, each in parts.items()})


def taken(rounds: Rounds, order_N) -> Rounds:
    """Some of the rounds, in an order."""
    return Rounds(
        **{each.name: getattr(rounds, each.name)[order_N] for each in fields(Rounds)}
    )


def in_turn_by_length(begins: np.ndarray) -> np.ndarray:
    """Places of several stretches in turn, each at its own pace."""
    lengths = np.diff(begins)
    pace = np.concatenate([(np.arange(n) + 0.5) / n for n in lengths])
    return np.argsort(pace, kind="stable")


def _errors(rounds: Rounds, logits_NG: Float[np.ndarray, "N G"]) -> dict[str, float]:
    """In the mean over drafts, and of first drafts alone."""
    assessed = assess_logits(rounds, logits_NG)
    return {
        "ece": float(np.mean(assessed["ece"])),
        "ece_first": assessed["ece"][0],
        "brier": float(np.mean(assessed["brier"])),
        "auc": float(np.nanmean(assessed["auc"])),
        "rounds": len(rounds),
    }


def _simulated(rounds: Rounds, forecasts: Mapping[str, np.ndarray]) -> dict:
    """Tokens per second of the schedule with each forecast, and of fixed lengths."""
    length = rounds.confidence_NG.shape[1]
    figures: dict[str, dict[str, float]] = {}
    for load, stated in COSTS.items():
        costs = _costs(length, *stated)
        figures[load] = speeds = {}
        for way, logits_NG in forecasts.items():
            survival_NG = np.cumprod(1 / (1 + np.exp(-logits_NG)), axis=1)
            trace = Trace.forecast(rounds, survival_NG)
            speeds[way] = _throughput(trace, Lagged(costs=costs), costs)
        for k in (0, *draft_ladder(length)[1:]):
            speeds[f"fixed {k}"] = _throughput(trace, Fixed(k), costs)
    return figures


def _throughput(trace: Trace, schedule, costs: Costs) -> float:
    load = Load(slots=_SLOTS, tokens=100)
    return simulate(trace, schedule, costs, load, rounds=400).throughput


def _costs(block_length: int, base: float, draft: float, token: float) -> Costs:
    """Stated: linear in what is drafted and verified, by slot."""
    curves = []
    for length in draft_ladder(block_length):
        full = _SLOTS * (length + 1)
        sizes = within_ladder(bucket_ladder(_SLOTS, block_length), full)
        sizes = (_SLOTS,) if not length else sizes
        seconds = (base + draft * length + token * size / _SLOTS for size in sizes)
        curves.append(CostCurve(length, sizes, tuple(seconds)))
    return Costs(tuple(curves))


def _show(console: Console, name: str, figures: dict) -> None:
    ways = list(figures["mixed"])
    table = Table(title=f"{name} · expected calibration error, mean (first draft)")
    table.add_column("texts")
    for way in (*ways[:2], "calibrated"):
        table.add_column(way, justify="right")

    def row(title: str, errors: Mapping[str, dict]) -> None:
        cells = (
            f"{100 * each['ece']:.1f} % ({100 * each['ece_first']:.1f} %)"
            for each in errors.values()
        )
        table.add_row(title, *cells)

    row("domains in turn", figures["mixed"])
    for place, (domain, errors) in enumerate(figures["drift"].items()):
        row(f"{'then ' if place else ''}{domain}, calibrated on the first", errors)
    console.print(table)
    for load, speeds in figures["simulated"].items():
        best = max(v for k, v in speeds.items() if k.startswith("fixed"))
        line = ", ".join(f"{way} {v / best:.3f}" for way, v in speeds.items())
        console.print(f"{load} load, simulated, against the best fixed length: {line}")
