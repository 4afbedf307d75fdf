"""Workers for many small programs, whose compiling takes most of the time."""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
)
from functools import partial
from typing import Any

import jax
from rich.progress import Progress

# A worker compiles as the process that started it would.
SETTINGS: dict[str, Callable[[str], Any]] = {
    "jax_disable_most_optimizations": jax.config.read,
    "jax_compilation_cache_dir": partial(getattr, jax.config),
    "jax_persistent_cache_min_compile_time_secs": partial(getattr, jax.config),
}
# Every worker process holds JAX and models of its own.
MOST = 8


@contextlib.contextmanager
def compile_workers(devices: int = 1) -> Iterator[Executor]:
    """A worker per core, each with so many virtual devices; leaves no work behind.

    On a CPU they are processes: tracing keeps a process's other threads waiting, and
    XLA compiles a small program on one core. What they run must be found by its module
    and name. An accelerator belongs to one process, so there is one thread for it.
    """
    on_cpu = jax.default_backend() == "cpu"
    workers = _processes(devices) if on_cpu else ThreadPoolExecutor(1)
    try:
        yield workers
    except BaseException:
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        workers.shutdown(cancel_futures=True)


def collect(progress: Progress, futures: Sequence[Future], description: str) -> list:
    """Results in the order of `futures`, under a bar; raises once one fails."""
    done = as_completed(futures)
    for each in progress.track(done, total=len(futures), description=description):
        each.result()
    return [each.result() for each in futures]


def _processes(devices: int) -> Executor:
    settings = {name: read(name) for name, read in SETTINGS.items()}
    settings["jax_num_cpu_devices"] = devices
    return ProcessPoolExecutor(
        min(os.cpu_count() or 1, MOST),
        # A forked process would share the locks of JAX's threads.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(settings,),
    )


def _start(settings: dict) -> None:
    """Sets a worker process up; it ends with the one that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    # JAX reports every accelerator plugin it does not find.
    logging.getLogger("jax").setLevel(logging.WARNING)
    # Every core has a worker: parts of a program are not compiled side by side.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_parallel_codegen_split_count=1"
    jax.config.update("jax_platforms", "cpu")
    for name, value in settings.items():
        jax.config.update(name, value)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
