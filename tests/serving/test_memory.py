"""What compiling leaves in memory is nobody else's, and what a server has is kept."""

import gc
import threading

import pytest

from jaxspark.serving.memory import Apart, keep_everything


def test_work_is_done_in_a_thread_that_ends():
    thread = Apart(threading.current_thread).result()
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


def test_what_goes_wrong_there_goes_wrong_here():
    def broken():
        raise FileNotFoundError("weights")

    with pytest.raises(FileNotFoundError, match="weights"):
        Apart(broken).result()


def test_what_is_there_is_not_looked_through_again():
    try:
        keep_everything()
        kept = gc.get_freeze_count()
        assert kept > 10_000 and len(gc.get_objects()) < kept / 10
    finally:
        gc.unfreeze()
