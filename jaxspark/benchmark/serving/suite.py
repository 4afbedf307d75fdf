"""`jaxspark bench --suite=serving`: loads, servers in turn, a table and figures.

Without `--url` servers of ours are compared, each a process: all are started, and those
that are not asked sleep. Every load goes to all of them in turn, the same questions at
the same times, so that a machine that changes its pace does so for all.
"""

import asyncio
import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxspark.benchmark.serving.client import Question, Timeline, ask
from jaxspark.benchmark.serving.figures import PERCENTILES, figures_of
from jaxspark.benchmark.serving.loads import Load
from jaxspark.benchmark.serving.options import ServingOptions
from jaxspark.benchmark.serving.process import serving
from jaxspark.benchmark.serving.trace import Lengths, Prose, drawn_lengths
from jaxspark.evaluation.prompts import DOMAINS, PROMPTS
from jaxspark.jsonlines import MalformedRow, read_json_lines
from jaxspark.progress import CellProgress, bars

KEY = "OPENAI_API_KEY"
# Answers to the long prompts of a load.
_LONG_OUTPUT = 8


def _slack(tokens: int) -> int:
    """Room for text that was cut by tokens, and is read as a few more."""
    return 16 + tokens // 32


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A server.

    Attributes:
      name: in tables.
      url: where it is.
      model: what it calls its model.
    """

    name: str
    url: str
    model: str


def bench_serving(
    console: Console,
    tokenizer,
    options: ServingOptions,
    *,
    flags: tuple[str, ...],
    prompts_dir: str | None,
    progress_file: str | None,
    settings: dict,
    on_figures: Callable[[dict], None],
) -> dict[str, dict[str, Any]]:
    """Figures by load and server.

    Args:
      console: where tables and bars are printed.
      tokenizer: counts the tokens of prompts.
      options: what is measured.
      flags: of our own servers, beside those that `options` say.
      prompts_dir: what prompts are made of; None for those of the package.
      progress_file: JSON lines that a stopped run goes on from; None keeps none.
      settings: what figures of another time must agree in, to stand beside new ones.
      on_figures: called with all figures whenever there are more.

    Raises:
      ValueError: a load that is unknown, a server that is not there.
    """
    loads = [Load.of(name) for name in options.arrivals]
    finished = CellProgress(progress_file, settings)
    figures: dict[str, dict[str, Any]] = {}
    texts = _texts(prompts_dir)
    with contextlib.ExitStack() as stack:
        servers: list[Contestant] = []
        for load in loads:
            if load.name not in finished.cells:
                if not servers:
                    servers += stack.enter_context(_servers(console, options, flags))
                found = _under(console, load, servers, tokenizer, texts, options)
                finished.add({"cell": load.name, "found": found})
            figures[load.name] = finished.cells[load.name]["found"]
            report(console, load.name, figures[load.name])
            on_figures(figures)
    return figures


@contextlib.contextmanager
def _servers(
    console: Console, options: ServingOptions, flags: tuple[str, ...]
) -> Iterator[list[Contestant]]:
    """All contestants, ready and warm."""
    context = options.capacity
    if any(name.endswith("+long") for name in options.arrivals):
        long = options.long_prompt
        context = max(context, long + _slack(long) + _LONG_OUTPUT)
    flags += (f"--slots={options.serving_slots}", f"--context={context}")
    with contextlib.ExitStack() as stack:
        found = []
        for url in options.url:
            found.append(Contestant(name=url, url=url, model=_model(url, options)))
        for name in () if options.url else options.servers:
            draft, at, schedule = name.partition("@")
            scheduled = (f"--schedule={schedule}",) if at else ()
            with console.status(f"starting {name}"):
                server = stack.enter_context(
                    serving(*flags, *scheduled, f"--draft={draft}")
                )
            found.append(Contestant(name=name, url=server.url, model=server.model))
        yield found


def _model(url: str, options: ServingOptions) -> str:
    """The model that is asked there: the first, unless one is named."""
    if options.url_model is not None:
        return options.url_model
    try:
        response = httpx.get(f"{url}/v1/models", headers=_headers(), timeout=30)
        return response.raise_for_status().json()["data"][0]["id"]
    except (httpx.HTTPError, KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{url}/v1/models tells no model: {error}") from error


def _headers() -> dict[str, str]:
    key = os.environ.get(KEY)
    return {"Authorization": f"Bearer {key}"} if key else {}


def _under(
    console: Console,
    load: Load,
    servers: list[Contestant],
    tokenizer,
    texts: list[str],
    options: ServingOptions,
) -> dict[str, Any]:
    """Figures of all servers under one load."""
    runs: dict[str, list[list[Timeline]]] = {each.name: [] for each in servers}
    long_runs: dict[str, list[list[Timeline]]] = {each.name: [] for each in servers}
    with bars(console) as progress:
        total = options.repeats * options.serving_requests * len(servers)
        bar = progress.add_task(load.name, total=total)
        for repeat in range(options.repeats):
            random = np.random.default_rng(repeat)
            prose = Prose(tokenizer, texts, random)
            lengths = drawn_lengths(
                options.serving_requests,
                scale=options.length_scale,
                context=options.capacity - _slack(options.capacity),
                random=random,
            )
            questions = _questions(prose, lengths, options)
            long = Lengths(prompt=options.long_prompt, output=_LONG_OUTPUT)
            # Enough for a long while; not all of them come.
            longs = _questions(prose, [long] * 64, options, "long") if load.long else []
            for server in servers:
                told, beside = asyncio.run(
                    _run(server, load, questions, longs, repeat, options,
                         lambda: progress.advance(bar))
                )  # fmt: skip
                runs[server.name].append(told)
                long_runs[server.name].append(beside)
    found = {name: figures_of(each) for name, each in runs.items()}
    if load.long:
        for name, each in long_runs.items():
            found[name]["long"] = figures_of(each)
    return found


async def _run(
    server: Contestant,
    load: Load,
    questions: list[Question],
    longs: list[Question],
    seed: int,
    options: ServingOptions,
    on_answer: Callable[[], None],
) -> tuple[list[Timeline], list[Timeline]]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=server.url,
        headers=_headers(),
        limits=limits,
        timeout=options.answer_seconds,
    ) as client:
        # What is cold is warm now: connections here, caches there.
        warm = Question(message="Hello.", max_tokens=8, temperature=0.0, seed=0)
        await asyncio.gather(*(ask(client, server.model, warm) for _ in range(2)))

        async def asked(question: Question) -> Timeline:
            timeline = await ask(client, server.model, question)
            if question.user != "long":
                on_answer()
            return timeline

        return await load.run(
            asked,
            questions,
            seed=seed,
            long_questions=longs,
            long_seconds=options.long_seconds,
        )


def _questions(
    prose: Prose, lengths: list[Lengths], options: ServingOptions, user: str = "load"
) -> list[Question]:
    return [
        Question(
            message=prose.message(each.prompt),
            max_tokens=each.output,
            temperature=options.load_temperature,
            seed=number,
            user=user,
        )
        for number, each in enumerate(lengths)
    ]


def _texts(prompts_dir: str | None) -> list[str]:
    """First turns of all prompts."""
    texts = []
    for domain in DOMAINS:
        path = Path(prompts_dir or PROMPTS) / f"{domain}_prompts.jsonl"
        for _, row in read_json_lines(path):
            if not isinstance(row, MalformedRow):
                texts.append(row["turns"][0])
    return texts


def report(console: Console, load: str, found: Mapping[str, Any]) -> None:
    """The table of a load; waits in milliseconds, by percentile."""
    table = Table(
        title=f"{load} · milliseconds at {', '.join(map(str, PERCENTILES))} %"
    )
    columns = ("server", "tokens/s", "first text", "between texts", "per token",
               "whole answer", "failed")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column == "server" else "right")
    rows = dict(found)
    for name, each in found.items():
        if "long" in each:
            rows[f"{name}, long prompts"] = each["long"]
    for name, each in rows.items():
        waits = (
            " ".join(_shown(value, 1e3, 0) for value in each[key].values())
            for key in (
                "first_seconds",
                "between_seconds",
                "per_token_seconds",
                "whole_seconds",
            )  # fmt: skip
        )
        failed = f"{each['failed']} of {each['requests']}"
        table.add_row(name, _shown(each["tokens_per_second"], 1, 1), *waits, failed)
    console.print(table)
    for name, each in rows.items():
        for error in each["errors"][:3]:
            console.print(f"{name}: {error}", style="red", markup=False)


def _shown(value: float, times: float, digits: int) -> str:
    """A figure; a dash where nothing was measured."""
    return "-" if math.isnan(value) else f"{value * times:.{digits}f}"
