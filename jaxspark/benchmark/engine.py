"""`jaxspark bench --suite=engine`: what serving costs beside `generate_stream`.

The same requests at once, decoded by the engine and by `generate_stream`, in turn in
one process, with the drafter and without. A server that tells every token as it comes
has more to do between rounds than a loop that nobody watches.
"""

import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxspark.benchmark.serving.options import ServingOptions
from jaxspark.drafters import Drafter
from jaxspark.generation import Request, SamplingParams, generate_stream
from jaxspark.generation.generate import round_capacity
from jaxspark.serving import Demand, Engine, Tokens
from jaxspark.timing import alternate, medians


def bench_engine(
    console: Console,
    target,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    options: ServingOptions,
) -> dict[str, dict[str, Any]]:
    """Tokens per second of both, with the drafter and without.

    Args:
      console: where the table is printed.
      target: a loaded target.
      drafter: what drafts.
      prompts: token ids; `serving_slots` of them are decoded together.
      options: how it is measured.
    """
    slots = options.serving_slots
    params = SamplingParams(
        max_new_tokens=options.new_tokens,
        temperature=options.load_temperature,
        stop_ids=(),
        seed=0,
    )
    requests = [Request(ids, params) for ids in islice(cycle(prompts), slots)]
    tokens = slots * options.new_tokens
    table = Table(title=f"{slots} requests at once · tokens/s")
    for column in ("", "generate_stream", "engine", "ratio"):
        table.add_column(column, justify="right")
    figures = {}
    for name, each in (("none", None), ("drafts", drafter)):
        # Not more than one engine holds caches.
        with Engine(target, each, slots=slots, context=options.capacity) as engine:
            contestants = {
                "generate_stream": _stream(target, each, requests, engine),
                "engine": _engine(engine, requests),
            }
            with console.status(f"decoding in turn: {name}"):
                seconds = alternate(contestants, options.repeats)
        middle = medians(seconds)
        ratio = middle["generate_stream"] / middle["engine"]
        speeds = {kind: tokens / spent for kind, spent in middle.items()}
        figures[name] = {**speeds, "ratio": ratio, "seconds": seconds}
        table.add_row(name, *(f"{v:.1f}" for v in speeds.values()), f"{ratio:.2f}")
    console.print(table)
    return figures


def _stream(
    target, drafter: Drafter | None, requests: list[Request], engine: Engine
) -> Callable[[], float]:
    """Decodes with the engine's own options and room."""

    def run() -> float:
        begun = time.perf_counter()
        for _ in generate_stream(
            target,
            requests,
            drafter,
            slots=len(requests),
            capacity=round_capacity(engine.context + engine.options.block),
            options=engine.options,
            max_stop_ids=16,
            log_probs=True,
        ):
            pass
        return time.perf_counter() - begun

    return run


def _engine(engine: Engine, requests: list[Request]) -> Callable[[], float]:
    def run() -> float:
        begun = time.perf_counter()
        demands = [
            Demand(group="bench", choice=place, request=request)
            for place, request in enumerate(requests)
        ]
        told = sum(
            len(event.tokens)
            for event in engine.submit(*demands)
            if isinstance(event, Tokens)
        )
        spent = time.perf_counter() - begun
        assert told == sum(r.params.max_new_tokens for r in requests)
        return spent

    return run
