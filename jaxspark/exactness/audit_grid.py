"""The audits' grids: which drafters, block lengths and batches are tried on what.

`cells` deals prompts over the grid: every drafter sees every prompt once, block lengths
and batch sizes take turns, so that each (drafter, block length, batch) is tried on its
share. With `full` every cell sees every prompt.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

from jaxspark.decoding import Fixed
from jaxspark.drafters import Drafter
from jaxspark.exactness.audit import AuditResult, audit, decode_requests
from jaxspark.exactness.audit_schedules import scheduler, synthetic_costs
from jaxspark.generation import Request

# Temperatures of the slots that fill up a batch beside the audited ones.
COMPANIONS = (1.0, 0.7)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One entry of an audit's grid.

    Attributes:
      drafter: its name.
      block_length: drafts per round.
      slots: requests decoded together.
      schedule: its name, see `parse_schedule`.
      requests: indices of the audited requests.
    """

    drafter: str
    block_length: int
    slots: int
    schedule: str
    requests: tuple[int, ...]

    @property
    def name(self) -> str:
        """A key for progress files."""
        place = f"{self.drafter} block {self.block_length} slots {self.slots}"
        return place if self.schedule == "fixed" else f"{place} {self.schedule}"


def cells(
    drafters: Sequence[str],
    block_lengths: Sequence[int],
    slots: Sequence[int],
    requests: int,
    *,
    schedules: Sequence[str] = ("fixed",),
    full: bool = False,
    most: int | None = None,
) -> Iterator[Cell]:
    """The grid, batch size by batch size; a cell keeps at most `most` requests.

    Schedules take turns over the cells.
    """
    turns = cycle(schedules)
    for s, count in enumerate(slots):
        for d, drafter in enumerate(drafters):
            for b, block_length in enumerate(block_lengths):
                chosen = tuple(
                    i
                    for i in range(requests)
                    if full or (b, s) == _deal(i, d, len(block_lengths), len(slots))
                )
                if most is not None and len(chosen) > most:
                    # Another part of the share for every drafter.
                    first = d * most % len(chosen)
                    chosen = (chosen[first:] + chosen[:first])[:most]
                if chosen:
                    yield Cell(
                        drafter=drafter,
                        block_length=block_length,
                        slots=count,
                        schedule=next(turns),
                        requests=chosen,
                    )


def _deal(request: int, drafter: int, block_lengths: int, batches: int):
    """Which block length and which batch size a request gets with a drafter."""
    again, block = divmod(request + drafter, block_lengths)
    if batches == 1:
        return block, 0
    # One in five goes to the first batch size, one request alone by default.
    return block, 0 if again % 5 == 0 else 1 + again % (batches - 1)


def run_cell(
    target,
    drafter: Drafter,
    cell: Cell,
    requests: Sequence[Request],
    plain: Sequence[Sequence[int]],
    *,
    coupling: str,
    capacity: int,
) -> AuditResult:
    """Decodes a cell's requests in batches and compares them with plain decoding.

    Larger batches keep two slots for sampled companions, which are not compared: a
    request must not notice who is decoded beside it.
    """
    result = AuditResult()
    audited = [requests[i] for i in cell.requests]
    expected = [plain[i] for i in cell.requests]
    full = cell.slots * (cell.block_length + 1)
    sizes = tuple(sorted({cell.slots, 2 * cell.slots, full}))
    # Compiling takes most of the time: one draft or all, not every length between.
    lengths = sorted({1, cell.block_length})
    costs = synthetic_costs(sizes, cell.slots, draft_lengths=lengths)
    schedule = scheduler(cell.schedule, costs)
    own = schedule == Fixed() or schedule.costs is not None
    step = cell.slots - (len(COMPANIONS) if cell.slots > len(COMPANIONS) else 0)
    for begin in range(0, len(audited), step):
        chunk = audited[begin : begin + step]
        batch = _fill(chunk, cell.slots, requests)
        seen = decode_requests(
            target,
            batch,
            drafter,
            block_length=cell.block_length,
            schedule=schedule,
            buckets=None if own else sizes,
            coupling=coupling,
            capacity=capacity,
        )
        result += audit(
            target, chunk, expected[begin : begin + step], seen[: len(chunk)]
        )
    return result


def _fill(chunk, slots, requests) -> list[Request]:
    """The audited requests, then sampled companions up to the batch's size."""
    missing = slots - len(chunk)
    return [
        *chunk,
        *(
            sampled(
                requests[(7 * i + 3) % len(requests)],
                temperature=COMPANIONS[i % len(COMPANIONS)],
                seed=1000 + i,
            )
            for i in range(missing)
        ),
    ]


def sampled_requests(requests: Sequence[Request]) -> list[Request]:
    """The same prompts at temperature 1, with seeds of their own."""
    return [
        sampled(request, temperature=1.0, seed=100 + i)
        for i, request in enumerate(requests)
    ]


def sampled(request: Request, *, temperature: float, seed: int) -> Request:
    """The same prompt, sampled."""
    params = replace(request.params, temperature=temperature, seed=seed)
    return replace(request, params=params)
