"""A server's threads share an arena of glibc's, and what it begins with is kept."""

import gc
import re
import subprocess
import sys

import pytest

from jaxspark.serving.memory import keep_everything
from tests.programs import environment

SCRIPT = """
import ctypes, sys, threading
from jaxspark.serving.memory import share_arena

def used(barrier):
    barrier.wait()  # All threads at once: one alone could take another's arena.
    ctypes.CDLL(None).malloc(100)
    barrier.wait()

print("shared" if share_arena() else "left", flush=True)
barrier = threading.Barrier(8)
threads = [threading.Thread(target=used, args=[barrier]) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
ctypes.CDLL(None).malloc_stats()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other allocators")
@pytest.mark.parametrize("told", [{}, {"MALLOC_ARENA_MAX": "4"}])
def test_threads_share_the_main_arena_unless_the_environment_says_otherwise(told):
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment() | told,
        capture_output=True,
        text=True,
        check=True,
    )
    arenas = len(re.findall(r"^Arena \d+:", found.stderr, re.MULTILINE))
    shared = found.stdout.strip() == "shared"
    assert shared == (not told)
    assert arenas == 1 if shared else arenas > 1


def test_what_is_there_is_not_looked_through_again():
    try:
        keep_everything()
        kept = gc.get_freeze_count()
        assert kept > 10_000 and len(gc.get_objects()) < kept / 10
    finally:
        gc.unfreeze()
