"""`jaxspark tune_kernels`: what it writes is what kernels read."""

import json
from dataclasses import replace

import jax.numpy as jnp
import pytest

from jaxspark.launch import tune_kernels
from jaxspark.launch.tune_kernels import Config, main
from jaxspark.tuning.search import Timed
from pallas_kernels import block_sizes
from pallas_kernels.block_sizes import ENVIRONMENT, shape

CONFIG = Config(topology="v5p:2x2x1", problems=("draft_sampling",))
SECONDS = {1024: 3e-6, 2048: 2e-6, 4096: 1e-6}


@pytest.fixture
def timer(monkeypatch):
    """Stands for a compiler; says what it was asked to time."""
    asked = []

    def timed(problem, candidates):
        for sizes in candidates:
            asked.append((problem.name, *sizes.values()))
            yield Timed(sizes=sizes, seconds=SECONDS[sizes["tokens"]])

    monkeypatch.setattr(tune_kernels, "parse_slice", lambda topology: None)
    monkeypatch.setattr(tune_kernels, "by_schedule", lambda *limits: timed)
    return asked


def drafted():
    """Tokens of a tile, as the kernel asks for them."""
    of = shape(jnp.bfloat16, B=32, R=256)
    return block_sizes.block_sizes("draft_sampling", of, tokens=2048)


def test_kernels_read_what_it_writes(timer, tmp_path, monkeypatch, capsys):
    figures = tmp_path / "figures.json"
    main(replace(CONFIG, out=str(tmp_path), json_out=str(figures)))
    assert f"wrote {tmp_path}" in capsys.readouterr().out.replace("\n", "")
    assert timer == [("draft_sampling flash", tokens) for tokens in SECONDS]
    [problem] = json.loads(figures.read_text())["problems"]
    assert [each["seconds"] for each in problem["timed"]] == list(SECONDS.values())
    monkeypatch.setattr(block_sizes, "expected_kind", lambda: "TPU v5")
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    assert drafted() == (4096,)
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "nothing"))
    assert drafted() == (2048,)


def test_without_a_folder_the_table_is_printed(timer, capsys):
    main(replace(CONFIG, least_gain=0.9))
    made = json.loads(capsys.readouterr().out)
    [entry] = made["ops"]["draft_sampling"].values()
    assert entry["sizes"] == entry["default"] == {"tokens": 2048}
    assert (made["chip"], made["by"]) == ("v5p", "static schedule")


def test_it_goes_on_where_it_stopped(timer, tmp_path):
    config = replace(CONFIG, out=str(tmp_path), progress=str(tmp_path / "progress"))
    main(config)
    first = (tmp_path / "v5p.json").read_text()
    timer.clear()
    main(config)
    assert not timer and (tmp_path / "v5p.json").read_text() == first
    with pytest.raises(ValueError, match="chip was 'v5p', now 'v6e'"):
        main(replace(config, topology="v6e:2x2"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"topology": None}, "are for TPUs, and this is cpu; for a chip that is not"),
        ({"topology": "h100:1"}, "static schedules are of TPUs, expected v5e, v5p,"),
        (
            {"problems": ("sampling",)},
            "--problems=sampling: none begins so; there are ",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_tuned_is_said(timer, options, says):
    with pytest.raises(ValueError, match=says):
        main(replace(CONFIG, **options))
