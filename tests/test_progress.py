"""Bars on terminals, and lines where nobody sees bars move."""

import io
import re
import time

import pytest
from rich.console import Console

from jaxspark import progress
from jaxspark.progress import bars


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=80)


def lines(console):
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("how", ["advance", "update", "track"])
def test_a_log_has_lines_before_the_end(console, how, monkeypatch):
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    with bars(console) as shown:
        if how == "track":
            for _ in shown.track(range(4), description="cells [1]", update_period=1e-3):
                time.sleep(0.05)
        else:
            bar = shown.add_task("cells [1]", total=4)
            shown.advance(bar) if how == "advance" else shown.update(bar, completed=1)
        seen = lines(console)
    assert re.match(r"cells \[1\]: [1-3] of 4 in 0:00:00", seen[0])


def test_a_log_is_not_filled_with_lines(console):
    with bars(console) as shown:
        bar = shown.add_task("cells", total=1000)
        for _ in range(1000):
            shown.advance(bar)
        assert not lines(console)
    assert "100%" in lines(console)[0]


def test_terminals_have_bars_alone(monkeypatch):
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with bars(console) as shown:
        shown.advance(shown.add_task("cells", total=4))
    assert "1 of 4" not in console.file.getvalue()
