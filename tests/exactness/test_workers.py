"""Workers that compile: processes on a CPU, threads elsewhere."""

import math
import os
import time

import jax
import pytest
from rich.progress import Progress

from jaxspark.exactness.workers import collect, compile_workers


@pytest.fixture(params=["cpu", "gpu"])
def backend(request, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    return request.param


def test_results_come_in_order(backend):
    with Progress() as progress, compile_workers() as workers:
        futures = [workers.submit(math.sqrt, n) for n in (9, 4, 1)]
        ran_in = workers.submit(os.getpid)
        assert collect(progress, futures, "roots") == [3, 2, 1]
        assert progress.finished
        assert (ran_in.result() == os.getpid()) == (backend == "gpu")


def test_an_error_is_raised_and_the_rest_left_undone(backend):
    with pytest.raises(ValueError, match="math domain|nonnegative"), Progress() as bars:
        with compile_workers() as workers:
            futures = [workers.submit(math.sqrt, -1)]
            futures += [workers.submit(time.sleep, 0.1) for _ in range(100)]
            collect(bars, futures, "roots")
    assert all(each.done() for each in futures)
    assert sum(each.cancelled() for each in futures) > 50


def few_optimizations():
    return jax.config.read("jax_disable_most_optimizations")


def test_worker_processes_optimise_as_little_as_this_one():
    before = few_optimizations()
    jax.config.update("jax_disable_most_optimizations", not before)
    try:
        with compile_workers() as workers:
            assert workers.submit(few_optimizations).result() == (not before)
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
