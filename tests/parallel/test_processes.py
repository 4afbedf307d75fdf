"""Several processes are one program, and none waits for one that is lost."""

import contextlib
import io
import os
import signal
import time
from pathlib import Path

import pytest
from flax import nnx

from jaxspark.checkpoints import Target, save_target
from jaxspark.launch import generate, program
from jaxspark.models import DenseDecoder
from jaxspark.parallel import processes
from jaxspark.parallel.processes import LOST, Job
from tests.checkpoints.tiny import dense, tokenizer
from tests.parallel.pairs import Pair
from tests.programs import call


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 2}, "go with --coordinator=HOST:PORT"),
        ({"coordinator": "host:1"}, "needs --processes and --process_index beside it"),
        ({"coordinator": "host", "processes": 2, "process_index": 0}, "expected HOST"),
        (
            {"coordinator": "host:1", "processes": 2, "process_index": 2},
            "--process_index=2: expected 0 to 1, as there are 2 processes",
        ),
        ({"distributed": "auto", "coordinator": "host:1"}, "finds its own"),
        ({"mesh": "rows:2"}, "expected sizes of data, expert, model"),
    ],
)
def test_what_cannot_be_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        generate.Config(prompt="a", **options)


def test_the_environment_tells_of_a_job():
    said = {
        "JAXSPARK_COORDINATOR": "leader:8476",
        "JAXSPARK_PROCESSES": "4",
        "JAXSPARK_PROCESS_INDEX": "3",
    }
    job = Job.of_environment(said, heartbeat_seconds=9)
    assert job == Job(
        coordinator="leader:8476", processes=4, process_index=3, heartbeat_seconds=9
    )
    assert Job.of_environment({}, heartbeat_seconds=9) is None
    with pytest.raises(ValueError, match="set together or not at all"):
        Job.of_environment(said | {"JAXSPARK_PROCESSES": ""}, heartbeat_seconds=9)


def test_pods_of_a_leaderworkerset_are_a_job():
    said = {
        "LWS_LEADER_ADDRESS": "flash-0.flash.llm",
        "LWS_GROUP_SIZE": "4",
        "LWS_WORKER_INDEX": "2",
    }
    assert Job.of_environment(said, heartbeat_seconds=9) == Job(
        coordinator=f"flash-0.flash.llm:{processes.GROUP_PORT}",
        processes=4,
        process_index=2,
        heartbeat_seconds=9,
    )
    alone = said | {"LWS_GROUP_SIZE": "1", "LWS_WORKER_INDEX": "0"}
    assert Job.of_environment(alone, heartbeat_seconds=9) is None
    # Ours come first.
    ours = {"JAXSPARK_COORDINATOR": "a:1", "JAXSPARK_PROCESSES": "2"}
    job = Job.of_environment(
        said | ours | {"JAXSPARK_PROCESS_INDEX": "1"}, heartbeat_seconds=9
    )
    assert job.coordinator == "a:1"


def test_a_process_that_fails_does_not_wait_for_the_others(monkeypatch, capsys):
    """JAX would, when Python ends, and for minutes."""
    left = []
    monkeypatch.setattr(processes, "leave", left.append)
    monkeypatch.setenv("JAXSPARK_SUPERVISED", "1")
    job = {"coordinator": "host:1", "processes": 2, "process_index": 1}
    chosen = generate.Config(prompt="a", **job)
    devices = contextlib.nullcontext
    monkeypatch.setattr(generate.Config, "devices", lambda config: devices())

    def fail(config):
        raise RuntimeError("something unforeseen")

    with contextlib.suppress(UnboundLocalError):  # Nothing goes on behind `leave`.
        program._run(fail, chosen)
    assert left == [1]
    assert "something unforeseen" in capsys.readouterr().err


def test_lost_processes_are_read_from_what_the_runtime_says(capfdbinary):
    said = b"E1 The following tasks are unhealthy (stopped sending heartbeats):\n1\n"
    said += b"/job:jax_worker/replica:0/task:12\nThe tasks have crashed 7\n3\n"
    lost = set()
    processes._pass_on(io.BytesIO(said), lost)
    assert lost == {1, 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    model = DenseDecoder(dense(max_position_embeddings=200_000), rngs=nnx.Rngs(0))
    save_target(folder / "target", Target(model=model, tokenizer=tokenizer()))
    return folder


GENERATE = ("generate", "--target=target", "--prompt=abc", "--mesh=data:8")


def texts(output):
    """What was generated, without how long it took.

    Standard output has our lines alone: the runtime's go to errors, in pieces.
    """
    lines = output.splitlines()
    return [line.split(" tokens/s")[0].split(" · ")[0] for line in lines if line]


@pytest.mark.long
def test_two_processes_say_what_one_says_and_one_of_them_says_it(folder):
    options = {"max_new_tokens": 24, "temperature": 1.0, "coupling": "gumbel"}
    flags = [f"--{name}={value}" for name, value in options.items()]
    [first, second] = Pair(folder, *GENERATE, *flags).ends()
    assert first[0] == second[0] == 0, first[2] + second[2]
    _, alone = call(folder, generate, target="target", prompt="abc", **options)
    assert texts(first[1]) == texts(alone), first[1]
    assert texts(second[1]) == []


@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_lost_process_ends_the_others_with_its_name(folder, killed):
    pair = Pair(folder, *GENERATE, "--max_new_tokens=100000", "--heartbeat_seconds=5")
    # Once it says so, they are in the middle of their collectives.
    while "[Gloo]" not in pair.children[0].stderr.readline():
        assert pair.children[0].poll() is None, pair.ends()
    victim = pair.children[killed].pid
    # The command that works is the child of the one that watches it.
    [worker] = Path(f"/proc/{victim}/task/{victim}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    begin = time.monotonic()
    ends = pair.ends(seconds=60)
    assert time.monotonic() - begin < 60
    assert ends[killed][0] == 128 + signal.SIGKILL
    status, _, errors = ends[1 - killed]
    assert status == LOST, errors
    assert "of this job was lost" in errors.splitlines()[-1]
