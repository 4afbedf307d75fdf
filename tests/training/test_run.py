"""Runs of the launcher: resumed to the bit; bad input loses nothing."""

import json
import shlex
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager

import jax
import numpy as np
import pytest

from jaxspark.checkpoints import load_draft_checkpoint, save_target
from jaxspark.checkpoints.tree import named_parameters
from jaxspark.launch import train_draft
from jaxspark.training.config import TrainConfig
from jaxspark.training.data.packing import Batches
from jaxspark.training.features import FeatureSource
from jaxspark.training.objective import DSPARK
from jaxspark.training.run import has_checkpoint, train
from jaxspark.training.trainer import Trainer
from tests import zoo
from tests.checkpoints.tiny import target
from tests.programs import call, command, environment, process
from tests.training import made

STEPS = 30
STOPPED = 128 + signal.SIGTERM


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny target and conversations in a folder, and a finished run."""
    folder = tmp_path_factory.mktemp("runs")
    save_target(folder / "target", target())
    random = np.random.default_rng(0)
    lines = []
    for i in range(40):
        answer = "".join(chr(97 + c) for c in random.integers(0, 26, 20))
        messages = [
            {"role": "user", "content": f"question {i}"},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"messages": messages}))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    launch(folder, "whole")
    return folder


RUN = {
    **{"target": "target", "data": ("data.jsonl",), "drafter": "dspark"},
    **{"head": "rnn", "rank": 8, "depth": 1, "taps": (0,), "draft_vocab": 64},
    **{"block_length": 3, "sequences": 2, "anchors": 8, "sequence_length": 96},
    **{"held_out": 2, "log_every": 1, "save_every": 5, "evaluate_every": 10},
    **{"steps": STEPS, "learning_rate": 1e-3, "init": "random"},
}
# Of runs without a launcher.
SHORT = TrainConfig(steps=4, sequences=1, anchors=4, block_length=4, dtype="bfloat16")


def launch(folder, out, **changes):
    """Runs the launcher in this process; returns what it printed."""
    status, printed = call(folder, train_draft, **RUN | {"out": out} | changes)
    assert status == 0, printed
    return printed


def metrics(folder, out):
    """The lines of a run but for the seconds."""
    lines = [
        json.loads(line)
        for line in (folder / out / "metrics.jsonl").read_text().splitlines()
    ]
    return [
        {k: v for k, v in line.items() if k != "seconds_per_step"} for line in lines
    ]


def kill(folder, out, *, after):
    """Starts a run and kills it once it has logged `after` steps."""
    running = subprocess.Popen(
        command("train_draft", **RUN, out=out),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    path = folder / out / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not path.exists() or path.read_text().count("\n") < after:
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.kill()
    running.communicate(timeout=300)


def stop(folder, out, monkeypatch, *, after):
    """Starts a run in this process and asks it to stop after so many steps."""

    @contextmanager
    def watched(console, steps):
        def show(line):
            if line["step"] == after:
                signal.raise_signal(signal.SIGTERM)

        yield show

    with monkeypatch.context() as patched:
        patched.setattr(train_draft, "watched", watched)
        return call(folder, train_draft, **RUN | {"out": out})


def test_a_killed_run_goes_on_to_the_bit(place):
    kill(place, "killed", after=7)
    assert 7 <= len(metrics(place, "killed")) < STEPS
    launch(place, "killed")
    assert metrics(place, "killed") == metrics(place, "whole")
    mine, whole = (
        named_parameters(
            load_draft_checkpoint(place / each / "drafter", target().model.config)
        )
        for each in ("killed", "whole")
    )
    for name, array in whole.items():
        np.testing.assert_array_equal(mine[name], array, err_msg=name)


def test_one_without_a_checkpoint_yet_begins_again(place):
    """A folder as a run leaves it that is killed after its first step."""
    shutil.copytree(place / "whole", place / "early")
    shutil.rmtree(place / "early/checkpoints")
    shutil.rmtree(place / "early/drafter")
    path = place / "early/metrics.jsonl"
    path.write_text(path.read_text().split("\n")[0] + "\n")
    launch(place, "early")
    assert metrics(place, "early") == metrics(place, "whole")


def test_a_drafter_without_a_confidence_head_has_no_such_term():
    """It would report a constant, ln 2."""
    model = zoo.target()
    config = TrainConfig(steps=1, block_length=2, objective=DSPARK)
    for kind, weight in (("dspark-vanilla", 1.0), ("dflash", 0.0), ("eagle3", 0.0)):
        trainer, _ = Trainer.create(zoo.drafter(kind, model), model, config)
        assert trainer.config.objective.confidence == weight
        assert trainer.config.objective.l1 == DSPARK.l1


def test_training_lowers_the_loss(place):
    lines = metrics(place, "whole")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    held_out = [line["held_out"]["loss"] for line in lines if "held_out" in line]
    assert len(held_out) == 3
    assert held_out[-1] < lines[0]["loss"] - 0.1


def test_a_finished_run_has_nothing_left_to_do(place):
    before = metrics(place, "whole")
    launch(place, "whole")
    assert metrics(place, "whole") == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"learning_rate": 2e-3}, "learning_rate was 0.001, now 0.002"),
        ({"taps": (7,)}, "must lie in -1..1"),
        ({"taps": (1,)}, "has the target's last layer 1, expected earlier"),
        ({"block_length": 0}, "block_length=0: expected at least 1"),
        ({"data": ("nowhere.jsonl",)}, "nowhere.jsonl: no such file or folder"),
        ({"sequences": 3}, "held_out=2 is less than a batch of sequences=3"),
        ({"held_out": 99}, "of which held_out=99 are kept for evaluation"),
        ({"cache_layers": (1,)}, "--cache_layers=(1,) lacks the taps [0]"),
        ({"cache_layers": (0, 9)}, "the target has layers 0..1"),
        ({"warm_start": "nowhere"}, "nowhere: no such folder"),
        ({"cooldown": 0.99}, "together at most 1"),
        ({"init": "least_squares", "drafter": "eagle3"}, "is for dspark and dflash"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_and_the_run_survives(place, more, message):
    with pytest.raises(ValueError) as error:
        launch(place, "whole", **more)
    assert message in str(error.value)
    assert metrics(place, "whole")[-1]["step"] == STEPS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"messages": [\n', "bad.jsonl:2: is not JSON"),
        (b"\xff\xfe\n", "bad.jsonl:2: is not UTF-8"),
        (
            b'{"messages": []}\n',
            'bad.jsonl:2: expected an object with a list "messages"',
        ),
        (b'{"messages": [{"role": 3}]}\n', 'expected messages with texts "role"'),
        (
            b'{"messages": [{"role": "user", "content": "x"}]}\n',
            "bad.jsonl:2: no message by the assistant",
        ),
    ],
    ids=str,
)
def test_a_bad_line_is_named(place, line, message):
    good = (place / "data.jsonl").read_bytes().splitlines(keepends=True)[0]
    (place / "bad.jsonl").write_bytes(good + line)
    with pytest.raises(ValueError) as error:
        launch(place, "bad", data=("bad.jsonl",))
    assert message in "".join(error.value.__notes__)


def test_parameters_that_are_no_numbers_are_not_saved(tmp_path):
    model, batch = zoo.target(), made.packed(20, 25)
    drafter = zoo.drafter("dflash", model)
    drafter.fc.weight[...] = drafter.fc.weight[...].at[0, 0].set(np.nan)
    trainer, state = Trainer.create(drafter, model, SHORT)
    source = FeatureSource(model, drafter.taps)
    with pytest.raises(ValueError, match="a parameter after step 1 is no finite"):
        train(trainer, state, Batches(batch, 1, 0), source, tmp_path, save_every=1)
    assert not has_checkpoint(tmp_path)


def test_a_checkpoint_of_bfloat16_training_is_restored_to_the_bit(tmp_path):
    model, batch = zoo.target(), made.packed(20, 25)
    drafter = zoo.drafter("dflash", model)
    source = FeatureSource(model, drafter.taps)

    def run(folder, stop_after=None):
        def stop(line):
            if line["step"] == stop_after:
                signal.raise_signal(signal.SIGTERM)

        trainer, state = Trainer.create(drafter, model, SHORT)
        batches = Batches(batch, 1, 0)
        return train(trainer, state, batches, source, folder, on_metrics=stop)

    _, done = run(tmp_path / "b", stop_after=2)
    assert not done
    (whole, _), (resumed, done) = run(tmp_path / "a"), run(tmp_path / "b")
    assert done
    types = {str(leaf.dtype) for leaf in jax.tree.leaves(whole)}
    assert types == {"bfloat16", "float32", "int32"}
    for a, b in zip(*map(jax.tree.leaves, (whole, resumed)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(place):
    shutil.copytree(place / "whole", place / "damaged")
    steps = sorted((place / "damaged/checkpoints").iterdir(), key=lambda p: int(p.name))
    assert [int(path.name) for path in steps] == [25, 30]
    for path in steps[-1].rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="30: cannot be restored"):
        launch(place, "damaged")
    shutil.rmtree(steps[-1])
    launch(place, "damaged")
    assert metrics(place, "damaged") == metrics(place, "whole")


@pytest.mark.long
def test_a_full_disk_loses_no_checkpoint(place, monkeypatch):
    """Files may not grow beyond a limit, as on a full disk."""
    code, printed = stop(place, "full", monkeypatch, after=12)
    assert code == STOPPED, printed
    assert "run the same command to go on" in printed.replace("\n", " ")
    assert len(metrics(place, "full")) in (12, 13)
    train = command("train_draft", **RUN | {"out": "full", "save_every": 1})
    failed = process(place, "bash", "-c", f"ulimit -f 8; exec {shlex.join(train)}")
    assert failed.returncode == 2, failed.stderr
    assert "error:" in failed.stderr
    launch(place, "full")
    assert metrics(place, "full") == metrics(place, "whole")


def test_a_dry_run_describes_and_trains_nothing(place):
    printed = launch(place, "dry", dry_run=True)
    for word in ("markov_head.joint_proj.weight", "trained parameters", "per epoch"):
        assert word in printed
    assert not (place / "dry").exists()
