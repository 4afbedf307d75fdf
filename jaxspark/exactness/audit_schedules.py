"""Guarantees 1 and 3 under every schedule, token by token, on tiny models.

Every drafter, schedule, coupling and set of buckets decodes each *mix* of requests -
one alone, a batch, and a stream whose slots finish and are taken over by requests with
other settings - and must give the tokens of plain decoding (`rejection_under_schedules`
has guarantee 2).

The targets are random, their vocabulary small: drafts are accepted now and then, so
that rounds of all lengths occur. Costs are made up such that schedules hesitate.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxspark.decoding import (
    AdjustmentLimits,
    CostCurve,
    Costs,
    DecodeOptions,
    Estimator,
    Scheduler,
    parse_schedule,
)
from jaxspark.decoding.costs import within_ladder
from jaxspark.decoding.couplings import COUPLINGS, Coupling
from jaxspark.decoding.schedule import CostAware
from jaxspark.drafters.hybrid import HybridDrafter
from jaxspark.exactness.audit import AuditResult, audit, decode_requests
from jaxspark.exactness.tiny_models import DRAFTERS, Family, tiny_models
from jaxspark.exactness.told import told_error
from jaxspark.generation import Completion, Request, SamplingParams, generate_stream
from jaxspark.parallel.mesh import slots_per_shard

SLOTS, BLOCK_LENGTH, CAPACITY = 4, 4, 64
VOCAB = 8
SCHEDULES = (
    "fixed", "fixed:1", "threshold:0.3", "causal", "lagged", "lagged:3", "free",
)  # fmt: skip
BUCKETS = ("one", "two", "narrow")
# Drafters that meet every set of buckets; others meet them in turn.
EVERY_BUCKET_SET = ("dspark-gated", "deepseek_v4_dspark")
MIXES = ("alone", "batch", "stream")
# What requests of adjusted mixes do to their logits, in turn, and room for it.
WISHES: tuple[dict[str, Any], ...] = (
    {"presence_penalty": 0.8},
    {"frequency_penalty": 0.7, "repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"logit_bias": {1: 3.0, 2: -100}},
    {"allowed_ids": [0, 1, 2, 5]},
    {"bad_words": [[3], [1, 2], [4, 4], [0, 1, 2]]},
    {"min_tokens": 5, "stop_ids": [0, 3]},
    {},
    {
        "presence_penalty": -0.5,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.2,
        "logit_bias": {7: 1.0},
        "bad_words": [[5, 6], [7, 7]],
        "min_tokens": 4,
        "stop_ids": [1, 4],
    },
)
ROOM = AdjustmentLimits(
    penalties=True,
    min_tokens=True,
    exclusions=True,
    biases=4,
    bad_words=4,
    bad_word_tokens=4,
)


@dataclass(frozen=True, kw_only=True)
class ScheduleCell:
    """One entry of the grid; decodes every mix of requests."""

    drafter: str
    schedule: str
    coupling: Coupling
    buckets: str
    estimates: bool = False

    @property
    def name(self) -> str:
        """For reports."""
        name = f"{self.drafter} · {self.schedule} · {self.coupling} · {self.buckets}"
        return f"{name} · estimator" if self.estimates else name


@dataclass(kw_only=True)
class ScheduleResult:
    """What a cell showed.

    Attributes:
      audit: differences from plain decoding.
      rounds, drafted, verified: rounds, those with drafts, and drafts verified; a grid
        in which schedules never choose would prove nothing.
      told_error: largest difference from log-probabilities of plain decoding.
    """

    audit: AuditResult
    rounds: int = 0
    drafted: int = 0
    verified: int = 0
    told_error: float = 0.0


def grid_of_schedules(
    *, every: int = 1, family: Family = "dense"
) -> list[ScheduleCell]:
    """All cells, or one in `every`.

    Every drafter meets every schedule under every coupling. Sets of buckets take turns
    over them, since packing a round does not depend on what drafted it; every other
    time acceptance is learned on the way.
    """
    choices = [
        (schedule, coupling)
        for schedule in SCHEDULES
        for coupling in COUPLINGS
        if coupling in parse_schedule(schedule).couplings
    ]
    return [
        ScheduleCell(
            drafter=drafter,
            schedule=schedule,
            coupling=coupling,
            buckets=buckets,
            estimates=(d + c + b) % 2 == 1,
        )
        for d, drafter in enumerate(DRAFTERS[family])
        for c, (schedule, coupling) in enumerate(choices)
        for b, buckets in enumerate(BUCKETS)
        if drafter in EVERY_BUCKET_SET or b == (d + c) % len(BUCKETS)
    ][::every]


def bucket_sizes(name: str, slots: int = SLOTS) -> tuple[int, ...]:
    """A set of token buckets for so many slots."""
    full = slots * (BLOCK_LENGTH + 1)
    return {
        "one": (full,),
        "two": (3 * slots // 2, full),
        # An anchor of each slot does not fit the first, all drafts no one.
        "narrow": (slots - 1, 2 * slots - 1, 3 * slots + 1),
    }[name]


def synthetic_costs(
    sizes: Sequence[int], slots: int = SLOTS, draft_lengths: Sequence[int] = (1, 4)
) -> Costs:
    """Rounds twice as long with all drafts as with none, in uneven steps."""
    curves = [CostCurve(0, (slots,), (1.05,))]
    for length in draft_lengths:
        verified = np.array(within_ladder(tuple(sizes), slots * (length + 1)))
        seconds = 0.93 + 0.02 * length + 0.25 * verified / slots
        seconds = np.maximum.accumulate(seconds + np.arange(len(verified)) % 3 / 20)
        curves.append(
            CostCurve(length, tuple(verified.tolist()), tuple(seconds.tolist()))
        )
    return Costs(tuple(curves))


def scheduler(name: str, costs: Costs) -> Scheduler:
    """A schedule by name; those that weigh costs get them, and try again often."""
    chosen = parse_schedule(name)
    if isinstance(chosen, CostAware):
        return replace(chosen, costs=costs, probe_share=0.1)
    return chosen


def spread_confidences(drafter):
    """The drafter with confidences that spread over (0, 1)."""
    model = drafter.model if isinstance(drafter, HybridDrafter) else drafter
    head = getattr(model, "confidence_head", None)
    if head is not None:
        head.proj.weight[...] *= 4.0
    return drafter


class ScheduleAudit:
    """Runs cells of the grid against plain decoding."""

    def __init__(
        self,
        seed: int = 0,
        family: Family = "dense",
        *,
        slots: int = SLOTS,
        shards: int = 1,
        drafters: Sequence[str] | None = None,
        mixes: Sequence[str] = MIXES,
        couplings: Sequence[Coupling] = COUPLINGS,
        adjusted: bool = False,
    ):
        """Makes models, requests and their plain outputs.

        Args:
          seed: of models and requests.
          family: of the models.
          slots: of batches and streams.
          shards: devices of the meshes that cells will be run on.
          drafters: those of the cells; None makes all.
          mixes: those of the cells.
          couplings: those of the cells.
          adjusted: whether requests adjust their logits, and want to know what is
            likely.
        """
        self.slots, self.adjusted = slots, adjusted
        # Compiling takes most of the time, and depth adds nothing here.
        self.target, made = tiny_models(
            family,
            VOCAB,
            seed=seed,
            layers=1,
            block_length=BLOCK_LENGTH,
            shards=shards,
            drafters=drafters,
        )
        self.drafters = {name: spread_confidences(each) for name, each in made.items()}
        random = np.random.default_rng(seed)
        self.mixes = {
            mix: list(_requests(mix, random, slots, adjusted)) for mix in MIXES
        }
        self.plain = {
            (mix, coupling): [
                self._plain(request, coupling) for request in self.mixes[mix]
            ]
            for mix in mixes
            for coupling in couplings
        }

    def run(self, cell: ScheduleCell, mixes: Sequence[str] = MIXES) -> ScheduleResult:
        """Decodes mixes of requests and compares what the coupling promises."""
        result = ScheduleResult(audit=AuditResult())
        for mix in mixes:
            requests = self.mixes[mix]
            alone = [[request] for request in requests]
            seen: list[Completion] = []
            for group in alone if mix == "alone" else [requests]:
                seen += self._decode(cell, group)
            # Rejection sampling promises a distribution, greedy decoding its tokens.
            exact = [
                i
                for i, request in enumerate(requests)
                if cell.coupling == "gumbel" or request.params.temperature == 0
            ]
            plain = self.plain[mix, cell.coupling]
            if self.adjusted:
                errors = [told_error(plain[i], seen[i]) for i in range(len(seen))]
                result.told_error = max(result.told_error, *errors)
            # Where outputs part, one device says why.
            with jax.set_mesh(None):
                result.audit += audit(
                    self.target,
                    [requests[i] for i in exact],
                    [plain[i].tokens for i in exact],
                    [seen[i] for i in exact],
                )
            result.rounds += sum(each.rounds for each in seen)
            result.drafted += sum(each.drafted for each in seen)
            result.verified += sum(each.verified for each in seen)
        return result

    def _plain(self, request: Request, coupling: Coupling) -> Completion:
        """What plain decoding makes of a request by itself."""
        [completion] = decode_requests(
            self.target,
            [request],
            coupling=coupling,
            capacity=CAPACITY,
            adjustments=ROOM if self.adjusted else None,
        )
        return completion

    def _decode(self, cell: ScheduleCell, requests) -> list[Completion]:
        per_shard = slots_per_shard(self.slots)
        sizes = bucket_sizes(cell.buckets, per_shard)
        # Every length with every set would be compiling most of the time.
        lengths = (1, BLOCK_LENGTH) if cell.buckets == "two" else (BLOCK_LENGTH,)
        costs = synthetic_costs(sizes, per_shard, draft_lengths=lengths)
        schedule = scheduler(cell.schedule, costs)
        told: dict[str, Any] = {}
        if self.adjusted:
            told = {"log_probs": True, "top_log_probs": 3, "prompt_log_probs": True}
            told["adjustments"] = ROOM
        done = dict(
            generate_stream(
                self.target,
                requests,
                self.drafters[cell.drafter],
                slots=self.slots,
                capacity=CAPACITY,
                options=DecodeOptions(
                    block_length=BLOCK_LENGTH,
                    coupling=cell.coupling,
                    schedule=schedule,
                    buckets=sizes if schedule.costs is None else None,
                    estimator=Estimator(every=2) if cell.estimates else None,
                ),
                together=2,
                rounds_per_step=2,
                **told,
            )
        )
        return [done[index] for index in range(len(requests))]


def _requests(
    mix: str, random: np.random.Generator, slots: int, adjusted: bool
) -> Iterator[Request]:
    """The requests of a mix; half of them greedy."""
    for i in range({"alone": 2, "batch": slots, "stream": 2 * slots + 2}[mix]):
        settings: dict[str, Any] = {}
        if i % 2:
            # Batches mix settings; in a stream a slot's next request has other ones.
            settings = [
                {"temperature": 1.0},
                {"temperature": 0.7, "top_p": 0.8},
                {"temperature": 1.3, "top_k": 4},
                {"temperature": 1.0, "min_drafts": 1},
                {"temperature": 1.0, "max_drafts": 2, "min_p": 0.1},
            ][i // 2 % 5]
        if adjusted:
            settings |= {"log_probs": True, "top_log_probs": 3, "prompt_log_probs": 2}
            settings |= WISHES[i % len(WISHES)]
        prompt = random.integers(VOCAB, size=random.integers(1, 20)).tolist()
        params = SamplingParams(
            max_new_tokens=int(random.integers(5, 25)) if mix == "stream" else 16,
            seed=100 + i,
            **settings,
        )
        yield Request(prompt, params, name=f"{mix} {i}")
