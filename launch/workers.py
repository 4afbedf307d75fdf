"""Workers for many small programs, whose compiling takes most of the time."""

import contextlib
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import (
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
)

import jax
from rich.progress import Progress

from launch import common


@contextlib.contextmanager
def compile_workers() -> Iterator[Executor]:
    """One worker per core, JAX set as in launchers; leaves no work behind.

    On a CPU they are processes: tracing keeps a process's other threads waiting, and
    XLA compiles a small program on one core. What they run must be found by its module
    and name. An accelerator belongs to one process, so there they are threads.
    """
    workers = _processes() if jax.default_backend() == "cpu" else _threads()
    try:
        yield workers
    finally:
        workers.shutdown(cancel_futures=True)


def collect(progress: Progress, futures: Sequence[Future], description: str) -> list:
    """Results in the order of `futures`, under a bar; raises once one fails."""
    done = as_completed(futures)
    for each in progress.track(done, total=len(futures), description=description):
        each.result()
    return [each.result() for each in futures]


def _threads() -> Executor:
    return ThreadPoolExecutor(os.cpu_count())


def _processes() -> Executor:
    few_optimizations = jax.config.read("jax_disable_most_optimizations")
    return ProcessPoolExecutor(
        os.cpu_count(),
        # A forked process would share the locks of JAX's threads.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(few_optimizations,),
    )


def _start(few_optimizations: bool) -> None:
    common.quiet()
    common.use_compilation_cache()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_disable_most_optimizations", few_optimizations)
