"""Options that say on which devices a launcher runs."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import jax

from jaxspark.configuration import Configuration, option
from jaxspark.parallel.mesh import make_mesh, parse_mesh
from jaxspark.parallel.processes import Job, keep_output_apart


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Configuration):
    """One device, a mesh of them, or a mesh over several processes."""

    mesh: str | None = option(
        "Shards along the axes data (slots), expert (slots and experts) and model "
        "(heads, vocabulary), such as data:2,expert:4; as many as there are devices. "
        "By default one device.",
        None,
    )
    distributed: str = option(
        "How the processes of a job find each other: auto asks the cluster (Slurm, "
        "Open MPI, a TPU slice).",
        "none",
        choices=("none", "auto"),
    )
    coordinator: str | None = option(
        "HOST:PORT of process 0, where no cluster tells. JAXSPARK_COORDINATOR in the "
        "environment says the same.",
        None,
    )
    processes: int | None = option(
        "Processes of the job (JAXSPARK_PROCESSES).", None, at_least=1
    )
    process_index: int | None = option(
        "Which of them this one is (JAXSPARK_PROCESS_INDEX).", None, at_least=0
    )
    heartbeat_seconds: int = option(
        "Seconds after which a silent process is given up, and the job with it.",
        30,
        at_least=1,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.mesh is not None:
            parse_mesh(self.mesh)
        if self.distributed == "auto" and self.coordinator is not None:
            raise ValueError("--distributed=auto finds its own --coordinator")
        self.job()

    def job(self) -> Job | None:
        """The job this process belongs to; None if it is alone.

        Raises:
          ValueError: only a part of it is said.
        """
        patience = self.heartbeat_seconds
        if self.distributed == "auto":
            return Job(heartbeat_seconds=patience)
        flags = (self.coordinator, self.processes, self.process_index)
        if all(each is None for each in flags):
            return Job.of_environment(os.environ, heartbeat_seconds=patience)
        return Job(
            coordinator=self.coordinator,
            processes=self.processes,
            process_index=self.process_index,
            heartbeat_seconds=patience,
        )

    @contextlib.contextmanager
    def devices(self) -> Iterator[None]:
        """Within it the processes are one program, and the mesh is in use."""
        job = self.job()
        if job is not None:
            keep_output_apart()
            job.connect()
            if jax.process_index():
                # One of them speaks for all.
                sys.stdout = open(os.devnull, "w")
        if self.mesh is None and job is None:
            yield
            return
        mesh = make_mesh(self.mesh or f"data:{jax.device_count()}")
        with jax.set_mesh(mesh):
            yield
