"""`jaxspark bench --suite=load`: throughput against the number of requests at once.

For every concurrency: no speculation (without any drafter), blocks of every fixed
length, and the schedule, in turn, on the same prompts, sampled. A run is some rounds
with all slots busy; what scheduling remembers goes on from run to run, as it does in a
server. The schedule's costs are measured first, its temperatures come with the drafter.
"""

import time
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle, islice

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from jaxspark.calibration.files import load_calibration
from jaxspark.calibration.profile import measured_with_progress
from jaxspark.checkpoints import load_drafter
from jaxspark.checkpoints.folders import sha256
from jaxspark.checkpoints.load import drafter_folder
from jaxspark.decoding import (
    DecodeOptions,
    DecodeState,
    Lagged,
    Sampling,
    decode,
    init_state,
    prefill,
)
from jaxspark.decoding.generate import check_block_length
from jaxspark.decoding.schedule_state import ScheduleState
from jaxspark.decoding.state import Counters
from jaxspark.drafters import Drafter, PlainDrafter
from jaxspark.evaluation.plots import plot_load
from jaxspark.evaluation.prompts import in_turn
from jaxspark.launch import common
from jaxspark.launch.progress import CellProgress, bars

flags.DEFINE_list(
    "concurrency", ["1", "2", "4", "8", "16", "32", "64"], "Requests at once."
)
flags.DEFINE_list(
    "fixed_lengths", ["1", "2", "3", "4", "5", "7"], "Fixed lengths, each drafted so."
)
flags.DEFINE_integer(
    "load_prompts",
    12,
    "Prompts that few requests at once take in turns.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "load_block", 4, "Drafts the schedule chooses from.", lower_bound=1
)
flags.DEFINE_integer("load_rounds", 16, "Rounds of each run.", lower_bound=1)
flags.DEFINE_float("load_temperature", 1.0, "Of --suite=load.", lower_bound=0.0)
flags.DEFINE_string(
    "progress", None, "JSON-lines file that a stopped --suite=load goes on from."
)
FLAGS = flags.FLAGS


@dataclass
class Contestant:
    """One way to decode a full house of requests, run again and again.

    Attributes:
      drafter, options: the way.
      runs: what `visit` returns, of all houses together, one by one.
      schedule: what scheduling remembers from run to run, as in a server.
    """

    drafter: Drafter
    options: DecodeOptions
    runs: list[np.ndarray] = field(default_factory=list)
    schedule: ScheduleState | None = None

    def visit(self, house: "House", run: int) -> np.ndarray:
        """Decodes `load_rounds` rounds in a house.

        Returns:
          Tokens, seconds, verified drafts and rounds of all slots together.
        """
        state = jax.block_until_ready(house.enter(self, run))
        # One call for all rounds, as what a call itself takes weighs where they are
        # short.
        rounds = jnp.int32(FLAGS.load_rounds)
        begin = time.perf_counter()
        state = decode(house.model, self.drafter, state, rounds, options=self.options)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - begin
        self.schedule = jax.tree.map(jnp.copy, state.schedule)
        gained = np.sum(np.array(state.lengths_B) - house.lengths_B)
        counters = state.counters
        verified, rounds = counters.verified_B.sum(), counters.rounds_B.sum()
        house.leave(state)
        return np.array([gained, seconds, int(verified), int(rounds)])

    def warm_up(self, house: "House") -> None:
        """Runs once what the schedule may choose: on CPUs a first time takes longer.

        What it must verify, may at most and has not tried for long leave no choice.
        """
        costs, slots = self.options.schedule.costs, len(house.lengths_B)
        for curve in costs.curves if costs else ():
            length = curve.draft_length
            for size in curve.sizes:
                forced_B = np.clip(size - slots - length * np.arange(slots), 0, length)
                state = house.enter(self, 0)
                due = 10**6 if length else 0
                schedule = replace(
                    state.schedule,
                    floor_B=jnp.array(forced_B, jnp.int32),
                    cap_B=jnp.array(forced_B, jnp.int32),
                    idle_BG=state.schedule.idle_BG.at[:, length - 1].set(due),
                )
                state = replace(state, schedule=schedule)
                state = decode(
                    house.model, self.drafter, state, jnp.int32(1), options=self.options
                )
                house.leave(state)

    def figures(self) -> dict[str, float]:
        """The median rate of the runs but the first, which compiled; means."""
        tokens, seconds, verified, rounds = np.array(self.runs[1:]).T
        return {
            "tokens_per_second": float(np.median(tokens / seconds)),
            "verified_tokens_per_slot": 1 + float(verified.sum() / rounds.sum()),
            "accepted_length": float(tokens.sum() / rounds.sum()),
        }


class House:
    """Requests that are prefilled once and decoded from there every time.

    All ways of decoding share the caches: rows past a request's length are never read,
    and drafters that do not look at a context have none.
    """

    def __init__(self, model, drafter: Drafter, prompts):
        # Nobody leaves: a request goes on past its answer's end, room for every draft.
        room = (FLAGS.load_rounds + 1) * (drafter.block_length + 1)
        limits = [len(p) + room for p in prompts]
        state = init_state(
            model,
            drafter,
            prompts,
            limits,
            Sampling.of(len(prompts), temperature=FLAGS.load_temperature),
            block_length=drafter.block_length,
            capacity=FLAGS.capacity,
        )
        self.model, self.drafter = model, drafter
        self.state = prefill(model, drafter, state, chunk=64)
        self.lengths_B = np.array(self.state.lengths_B)

    def enter(self, contestant: Contestant, run: int) -> DecodeState:
        """The state after prefill, with random numbers of this run."""
        slots, block_length = len(self.lengths_B), contestant.options.block_length
        schedule = contestant.schedule
        self.context = self.state.draft_cache
        draft_cache = self.context
        if contestant.drafter is not self.drafter:
            draft_cache = contestant.drafter.init_cache(slots, FLAGS.capacity)
        return replace(
            self.state,
            lengths_B=jnp.array(self.lengths_B),
            done_B=jnp.zeros((slots,), bool),
            sampling=Sampling.of(
                slots,
                temperature=FLAGS.load_temperature,
                seed=1000 * run + np.arange(slots),
            ),
            draft_cache=draft_cache,
            confidence_BG=jnp.zeros((slots, block_length)),
            sharpness_BG=jnp.zeros((slots, block_length)),
            counters=Counters.zeros(slots, block_length),
            schedule=schedule or ScheduleState.start(slots, block_length),
        )

    def leave(self, state: DecodeState) -> None:
        """Takes the caches back."""
        self.state = replace(state, draft_cache=state.draft_cache or self.context)


def bench_load(console: Console) -> dict:
    """Tokens per second by concurrency, and what was verified for them."""
    target = common.load_text_target()
    drafter = load_drafter(FLAGS.draft, target)
    calibration = load_calibration(FLAGS.draft, "rejection")
    for length in (FLAGS.load_block, *common.positive("fixed_lengths")):
        check_block_length(drafter, length)
    calibration.check(FLAGS.load_block, "rejection")
    domains = common.load_domains(
        target.tokenizer,
        per_domain=FLAGS.prompts_per_domain,
        max_tokens=FLAGS.capacity // 2,
    )
    prompts = in_turn(domains)
    finished = CellProgress(FLAGS.progress, _settings())
    figures = {}
    for slots in map(str, common.positive("concurrency")):
        if slots not in finished.cells:
            found = at_concurrency(
                console, target.model, drafter, int(slots), prompts, calibration
            )
            finished.add({"cell": slots, "found": found})
            # None of the programs is used again, and all hold memory.
            jax.clear_caches()
        figures[slots] = finished.cells[slots]["found"]
        report(console, figures)
        if FLAGS.json_out:
            common.write_figures(FLAGS.json_out, {"figures": figures})
    if FLAGS.json_out:
        plot_load(FLAGS.json_out.removesuffix(".json") + ".png", figures)
    return figures


def _settings() -> dict:
    """What figures of another time must agree in, to stand beside new ones."""
    names = ("draft", "target", "dtype", "repeats", "capacity", "fixed_lengths")
    names += ("prompts_dir", "prompts_per_domain", "load_prompts", "load_block")
    names += ("load_rounds", "load_temperature")
    folder, _ = drafter_folder(FLAGS.draft)
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")])
    settings = {name: FLAGS[name].value for name in names}
    return settings | {"files": [sha256(file) for file in files]}


def at_concurrency(console, model, drafter, slots, prompts, calibration) -> dict:
    """All contestants with one number of requests.

    Few requests are too few prompts to compare by: small houses come in numbers.
    """
    count = -(-min(FLAGS.load_prompts, len(prompts)) // slots)
    everyone = cycle(prompts)
    houses = [
        House(model, drafter, list(islice(everyone, slots))) for _ in range(count)
    ]
    profile = measured_with_progress(
        model,
        drafter,
        console=console,
        slots=slots,
        block_length=FLAGS.load_block,
        capacity=FLAGS.capacity,
        temperature=FLAGS.load_temperature,
    )
    contestants = {
        "none": Contestant(
            PlainDrafter(), DecodeOptions(block_length=0, buckets=(slots,))
        )
    }
    for length in common.positive("fixed_lengths"):
        contestants[f"fixed {length}"] = Contestant(
            drafter, DecodeOptions(block_length=length)
        )
    contestants["scheduled"] = Contestant(
        drafter,
        DecodeOptions(
            block_length=FLAGS.load_block,
            calibration=calibration,
            schedule=Lagged(costs=profile.costs),
        ),
    )
    with bars(console) as progress:
        title = f"{slots} requests: decoding in turn"
        bar = progress.add_task(title, total=(FLAGS.repeats + 1) * len(houses))
        for each in contestants.values():
            each.warm_up(houses[0])
        for run in range(FLAGS.repeats + 1):
            totals = {name: np.zeros(4) for name in contestants}
            # A visit takes a second or two, and machines change their pace: taking
            # turns at every house keeps the contestants' conditions alike.
            for house in houses:
                for name, each in contestants.items():
                    totals[name] += each.visit(house, run)
                progress.advance(bar)
            for name, each in contestants.items():
                each.runs.append(totals[name])
    return {name: each.figures() for name, each in contestants.items()} | {
        "costs": asdict(profile.costs)
    }


def report(console: Console, figures: dict) -> None:
    """The table so far."""
    table = Table(title=f"{FLAGS.draft} · tokens/s by requests at once")
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
