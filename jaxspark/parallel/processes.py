"""Several processes that are one program: JAX's multi-controller runtime.

Every process runs the same command on its own devices. They find each other by what a
cluster tells them (Slurm, Open MPI, TPU slices), or by the address of process 0.
Whatever the host decides, each process decides alike: they are given the same prompts,
and read the same arrays back. Process 0 alone prints and writes files.

No process can go on without the others. One that is lost leaves them in a collective,
from which JAX's runtime aborts them once it misses heartbeats, in C++: no Python
handler runs. So a process is the child of another that waits for it, tells in one line
what happened, and ends with a status of its own.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

import jax

# Where the pods of a group or a job meet, on the first. Any free port would do.
GROUP_PORT = 8482
# A process of a job ended because another one was lost.
LOST = 3
_CHILD = "JAXSPARK_SUPERVISED"
# How the runtime lists processes that it misses: one a line, below this word.
_MISSED = b"unhealthy"
_PROCESS = re.compile(rb"(?:.*/task:)?(\d+)\s*$")


@dataclass(frozen=True, kw_only=True)
class Job:
    """The processes of a program, as one of them is told about them.

    Attributes:
      coordinator: host and port of process 0; None where the cluster tells all.
      processes: how many.
      process_index: which of them this one is.
      heartbeat_seconds: time after which a silent process is given up.
    """

    coordinator: str | None = None
    processes: int | None = None
    process_index: int | None = None
    heartbeat_seconds: int = 30

    def __post_init__(self):
        given = (self.coordinator, self.processes, self.process_index)
        if self.coordinator is None:
            if any(each is not None for each in given):
                raise ValueError(
                    "--processes and --process_index go with --coordinator=HOST:PORT"
                )
            return
        if None in given:
            raise ValueError(
                f"--coordinator={self.coordinator} needs --processes and "
                "--process_index beside it"
            )
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"--coordinator={self.coordinator}: expected HOST:PORT")
        assert self.processes is not None and self.process_index is not None
        if not 0 <= self.process_index < self.processes:
            raise ValueError(
                f"--process_index={self.process_index}: expected 0 to "
                f"{self.processes - 1}, as there are {self.processes} processes"
            )

    @classmethod
    def of_environment(
        cls, environment: Mapping[str, str], *, heartbeat_seconds: int
    ) -> "Job | None":
        """The job that variables of the environment tell of; None without one.

        They are ours, or those of a LeaderWorkerSet's group of pods.

        Raises:
          ValueError: only some of them are set, or one is no number.
        """
        names = ("COORDINATOR", "PROCESSES", "PROCESS_INDEX")
        values = [environment.get(f"JAXSPARK_{name}") for name in names]
        if not any(values):
            return cls._of_group(environment, heartbeat_seconds)
        if not all(values):
            raise ValueError(
                f"JAXSPARK_{', JAXSPARK_'.join(names)} are set together or not at all, "
                f"got {values}"
            )
        coordinator, processes, index = map(str, values)
        try:
            return cls(
                coordinator=coordinator,
                processes=int(processes),
                process_index=int(index),
                heartbeat_seconds=heartbeat_seconds,
            )
        except ValueError as error:
            raise ValueError(f"of the environment's JAXSPARK_...: {error}") from error

    @classmethod
    def _of_group(
        cls, environment: Mapping[str, str], heartbeat_seconds: int
    ) -> "Job | None":
        leader = environment.get("LWS_LEADER_ADDRESS")
        size = int(environment.get("LWS_GROUP_SIZE") or 1)
        if not leader or size == 1:
            return None
        return cls(
            coordinator=f"{leader}:{GROUP_PORT}",
            processes=size,
            process_index=int(environment["LWS_WORKER_INDEX"]),
            heartbeat_seconds=heartbeat_seconds,
        )

    def connect(self) -> None:
        """Joins the others; returns once all are there.

        Raises:
          ValueError: nothing tells where they are.
          RuntimeError: they did not come.
        """
        # It would take SIGTERM from programs that do not ask for it.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            self.coordinator,
            self.processes,
            self.process_index,
            heartbeat_timeout_seconds=self.heartbeat_seconds,
        )


def is_supervised() -> bool:
    """Whether another process waits for this one."""
    return _CHILD in os.environ


def supervise() -> int:
    """Runs this command again as a child, and says why it ended.

    Signals that ask to end are handed on. Returns the status to end with: the child's,
    or `LOST`.
    """
    child = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        env=os.environ | {_CHILD: "1"},
        stderr=subprocess.PIPE,
    )
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(each, lambda number, _: child.send_signal(number))
    assert child.stderr is not None
    lost: set[int] = set()
    reader = threading.Thread(target=_pass_on, args=(child.stderr, lost), daemon=True)
    reader.start()
    status = child.wait()
    reader.join(timeout=5)
    if status == -signal.SIGABRT:
        who = " and ".join(f"process {index}" for index in sorted(lost))
        print(
            f"error: {who or 'another process'} of this job was lost, so this one "
            "could not go on; start them all again",
            file=sys.stderr,
        )
        return LOST
    if status < 0:
        name = signal.Signals(-status).name
        print(f"error: this process was ended by {name}", file=sys.stderr)
        return 128 - status
    return status


def _pass_on(stream: BinaryIO, lost: set[int]) -> None:
    """Copies what the child says, and notes which processes the runtime names."""
    listing = False
    for line in iter(stream.readline, b""):
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
        if listing := _MISSED in line or (listing and bool(_PROCESS.match(line))):
            if match := _PROCESS.match(line):
                lost.add(int(match[1]))


def keep_output_apart() -> None:
    """Leaves standard output to Python; what libraries print there goes to errors.

    Gloo tells of its connections from several threads, so that pieces of its lines lie
    anywhere, in the middle of ours too.
    """
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding)
    os.dup2(2, 1)


def leave(status: int) -> None:
    """Ends this process at once, without waiting for the others to end too."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
