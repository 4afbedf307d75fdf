"""What `jaxspark bench --suite=serving` measures."""

import asyncio
import json
import time

import numpy as np
import pytest
from rich.console import Console

from jaxspark.benchmark.serving.client import Question, Timeline
from jaxspark.benchmark.serving.figures import figures_of
from jaxspark.benchmark.serving.loads import Load
from jaxspark.benchmark.serving.suite import report
from jaxspark.benchmark.serving.trace import Prose, drawn_lengths
from jaxspark.checkpoints import save_target
from jaxspark.launch import bench
from tests.checkpoints import tiny
from tests.programs import call
from tests.serving.hosting import hosted


def question(name):
    return Question(message=name, max_tokens=4, temperature=0.0, seed=0)


def test_lengths_are_those_of_the_trace():
    random = np.random.default_rng(0)
    drawn = drawn_lengths(20_000, scale=1.0, context=100_000, random=random)
    prompts = [each.prompt for each in drawn]
    outputs = [each.output for each in drawn]
    # Means of the trace itself are 1155 and 211, medians 1020 and 129.
    assert (
        abs(np.mean(prompts) / 1155 - 1) < 0.1 and abs(np.median(prompts) - 1020) < 20
    )
    assert abs(np.mean(outputs) / 211 - 1) < 0.1 and abs(np.median(outputs) - 129) < 5


def test_lengths_fit_into_the_context():
    random = np.random.default_rng(0)
    for scale in (0.001, 1.0):
        for each in drawn_lengths(2000, scale=scale, context=64, random=random):
            assert each.prompt >= 1 and each.output >= 2
            assert each.prompt + each.output <= 64


def test_messages_have_the_wanted_length_and_differ():
    tokenizer = tiny.tokenizer()
    random = np.random.default_rng(0)
    prose = Prose(tokenizer, ["One text.", "Another, longer text."], random)
    for tokens in (30, 60, 200):
        message = prose.message(tokens)
        chat = tokenizer.chat([{"role": "user", "content": message}])
        assert len(chat) == tokens
    assert prose.message(100) != prose.message(100)


@pytest.mark.parametrize(
    "name",
    ["", "closed", "closed:0", "closed:1.5", "poisson:-1", "open:1", "closed:1+x"],
)
def test_unknown_loads_are_named(name):
    with pytest.raises(ValueError, match=f"the load '{name}'".replace("+", r"\+")):
        Load.of(name)


def test_closed_loops_keep_their_clients_busy_and_open_ones_do_not_wait():
    going, most = 0, 0

    async def ask(question):
        nonlocal going, most
        timeline = Timeline(sent=time.monotonic())
        going += 1
        most = max(most, going)
        await asyncio.sleep(0.05)
        going -= 1
        return timeline

    questions = [question(str(i)) for i in range(40)]
    told, _ = asyncio.run(Load.of("closed:3").run(ask, questions, seed=0))
    assert len(told) == 40 and most == 3
    most = 0
    told, _ = asyncio.run(Load.of("poisson:400").run(ask, questions, seed=0))
    assert len(told) == 40 and most > 5
    sent = np.diff(sorted(each.sent for each in told))
    # Gaps are exponential: their deviation is their mean.
    assert 0.4 < sent.std() / sent.mean() < 2.5


def test_long_prompts_come_beside_the_others():
    asked = []

    async def ask(question):
        asked.append(question.message)
        await asyncio.sleep(0.02)
        return Timeline(sent=time.monotonic())

    told, beside = asyncio.run(
        Load.of("closed:1+long").run(
            ask,
            [question("short")] * 10,
            seed=0,
            long_questions=[question("long")] * 100,
            long_seconds=0.05,
        )
    )
    assert len(told) == 10 and 2 <= asked.count("long") <= 8
    assert len(beside) <= asked.count("long")


def test_figures_count_what_arrives_together_once_and_errors_apart():
    runs = [
        [
            Timeline(sent=0.0, arrivals=[1.0, 1.5, 3.0], ended=3.0, output_tokens=5),
            Timeline(sent=1.0, arrivals=[2.0], ended=4.0, output_tokens=1),
            Timeline(sent=1.0, ended=1.5, error="503: full"),
        ]
    ]
    found = figures_of(runs)
    assert found["tokens_per_second"] == 6 / 4
    assert found["first_seconds"]["50"] == 1.0
    assert found["between_seconds"]["50"] == 1.0  # Of 0.5 and 1.5.
    assert found["per_token_seconds"]["99"] == 0.5
    assert (found["requests"], found["failed"]) == (3, 1)
    assert found["errors"] == ["503: full"]


def test_long_prompts_that_fail_are_told():
    good = Timeline(sent=0.0, arrivals=[1.0, 1.5], ended=2.0, output_tokens=4)
    bad = Timeline(sent=0.0, ended=0.1, error="400: too long")
    found = {"ours": figures_of([[good]]) | {"long": figures_of([[bad]])}}
    console = Console(record=True, width=150)
    report(console, "closed:1+long", found)
    said = console.export_text()
    assert "0 of 1" in said and "1 of 1" in said and "nan" not in said
    assert "ours, long prompts: 400: too long" in said


def test_any_server_is_measured_and_a_stopped_run_goes_on(tmp_path):
    options = {
        **{"suite": "serving", "capacity": 128, "length_scale": 0.02, "repeats": 3},
        **{"serving_requests": 4, "json_out": "out.json", "progress": "out.jsonl"},
        **{"arrivals": ("closed:2", "poisson:50"), "target": str(tmp_path / "target")},
    }
    with hosted(api_keys=()) as here:
        save_target(tmp_path / "target", here.target)
        options["url"] = (here.url,)
        _, said = call(tmp_path, bench, **options)
        before = here.engine.stats().output_tokens
        _, again = call(tmp_path, bench, **options)
        assert here.engine.stats().output_tokens == before
    assert "between texts" in said and "between texts" in again
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert set(figures) == {"closed:2", "poisson:50"}
    for each in figures.values():
        found = each[here.url]
        assert (found["requests"], found["failed"]) == (12, 0), found["errors"]
        assert found["tokens_per_second"] > 0 < found["first_seconds"]["50"]
        assert found["output_tokens"] >= 2
    assert (tmp_path / "out.png").exists()
    with pytest.raises(ValueError, match="tells no model"):
        call(
            tmp_path,
            bench,
            **options | {"url": ("http://127.0.0.1:1",), "progress": None},
        )
