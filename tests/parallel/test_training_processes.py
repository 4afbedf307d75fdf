"""Drafters trained by several processes: the steps of one, kept and gone on with."""

import json
import signal
import time
from contextlib import contextmanager

import jax
import numpy as np
import pytest

from jaxspark.checkpoints import load_draft_checkpoint, save_target
from jaxspark.checkpoints.tree import named_parameters
from jaxspark.launch import train_draft
from jaxspark.parallel.mesh import make_mesh
from jaxspark.training.run import Checkpoints
from tests.checkpoints.tiny import target
from tests.parallel import checkpoint_states
from tests.parallel.checkpoint_states import BACK, KINDS, THERE
from tests.parallel.pairs import Pair
from tests.programs import call, command
from tests.training import made

STEPS, STOPPED = 9, 128 + signal.SIGTERM
RUN = {
    **{"target": "target", "data": ("data.jsonl",), "drafter": "dspark", "rank": 8},
    **{"depth": 1, "taps": (0,), "draft_vocab": 64, "init": "random"},
    **{"block_length": 3, "sequences": 8, "anchors": 4, "sequence_length": 64},
    **{"held_out": 8, "log_every": 1, "evaluate_every": 4, "steps": STEPS},
    **{"learning_rate": 1e-3, "optimizer": "adam"},
}


def test_a_checkpoint_moves_between_two_processes_and_one_device(tmp_path):
    """To the bit, there and back; of drafters' training and of DeepSeek-V4's."""
    described = {kind: shapes() for kind, (shapes, _) in KINDS.items()}
    for kind, shapes in described.items():
        whole = jax.device_put(checkpoint_states.filled(shapes, BACK))
        checkpoint_states.save(tmp_path / kind / "back", whole)
    both = Pair(tmp_path, module="tests.parallel.checkpoint_states").ends()
    assert [status for status, *_ in both] == [0, 0], both
    assert [said for _, said, _ in both] == ["equal\n", ""]
    for kind, shapes in described.items():
        empty = jax.device_put(checkpoint_states.zeros(shapes))
        restored = Checkpoints(tmp_path / kind / "there").restore(empty)
        assert {len(leaf.devices()) for leaf in jax.tree.leaves(restored)} == {1}
        expected = checkpoint_states.filled(shapes, THERE)
        checkpoint_states.check_equal(restored, expected)


def lines(folder):
    """What a run logged."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def raising(after):
    """A stand-in for `watched` that sends this process SIGTERM after some steps."""

    @contextmanager
    def watched(console, steps):
        def show(line):
            if line["step"] == after:
                signal.raise_signal(signal.SIGTERM)

        yield show

    return watched


@pytest.mark.long
def test_a_run_moves_between_one_process_and_two_that_stop_together(
    tmp_path, monkeypatch
):
    """One process is stopped, two go on and are stopped, one goes on to the end."""
    save_target(tmp_path / "target", target())
    random = np.random.default_rng(0)
    with (tmp_path / "data.jsonl").open("w") as file:
        for i in range(60):
            answer = "".join(chr(97 + c) for c in random.integers(0, 26, 20))
            asked = {"role": "user", "content": f"question {i}"}
            said = {"role": "assistant", "content": answer}
            file.write(json.dumps({"messages": [asked, said]}) + "\n")

    def alone(out):
        with jax.set_mesh(make_mesh("data:8")):
            return call(tmp_path, train_draft, **RUN | {"out": out})[0]

    assert alone("one") == 0
    with monkeypatch.context() as patched:
        patched.setattr(train_draft, "watched", raising(after=1))
        assert alone("two") == STOPPED
    begun, two = len(lines(tmp_path / "two")), tmp_path / "two"

    # Without the processes that watch them; those have a test of their own.
    train = command("train_draft", **RUN | {"out": "two", "mesh": "data:8"})[3:]
    pair = Pair(tmp_path, *train, supervised=False)
    deadline = time.monotonic() + 300
    while len(lines(two)) == begun:
        assert pair.children[0].poll() is None, pair.ends()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    pair.children[1].send_signal(signal.SIGTERM)
    both = pair.ends()
    assert [status for status, *_ in both] == [STOPPED] * 2, both
    assert "run the same command to go on" in both[0][1].replace("\n", " ")
    assert not both[1][1]
    assert begun < len(lines(two)) < STEPS

    assert alone("two") == 0
    mine, whole = lines(two), lines(tmp_path / "one")
    for line in mine + whole:
        del line["seconds_per_step"]
    assert [line["step"] for line in mine] == list(range(1, STEPS + 1))
    made.close(mine, whole, atol=1e-4)
    drafters = (
        load_draft_checkpoint(tmp_path / name / "drafter", target().model.config)
        for name in ("two", "one")
    )
    made.close(*map(named_parameters, drafters), atol=1e-4)
