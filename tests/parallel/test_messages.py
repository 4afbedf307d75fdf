"""Process 0 tells the others, in order, and knows who is lost or asked to end."""

import threading
import time

import jax
import pytest

from jaxspark.parallel import messages
from jaxspark.parallel.messages import BLOCK, Receiver, Sender


class Store:
    """What JAX's coordinator keeps, for one process that plays all."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()
        self.gone = False

    def key_value_set_bytes(self, key, value, allow_overwrite=False):
        with self.changed:
            assert allow_overwrite or key not in self.values
            self.values[key] = value
            self.changed.notify_all()

    def key_value_try_get_bytes(self, key):
        if key not in self.values:
            raise jax.errors.JaxRuntimeError("NOT_FOUND")
        return self.values[key]

    def blocking_key_value_get_bytes(self, key, timeout_in_ms):
        with self.changed:
            self.changed.wait_for(
                lambda: key in self.values or self.gone, timeout_in_ms / 1000
            )
            if self.gone:
                raise jax.errors.JaxRuntimeError("UNAVAILABLE: connection refused")
            if key not in self.values:
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: timed out")
            return self.values[key]

    def key_value_delete(self, key):
        with self.changed:
            assert key.endswith("/")
            for each in [each for each in self.values if each.startswith(key)]:
                del self.values[each]


@pytest.fixture
def store(monkeypatch):
    store = Store()
    monkeypatch.setattr(messages, "_client", lambda: store)
    monkeypatch.setattr(messages, "BEAT_S", 0.02)
    monkeypatch.setattr(messages, "LOOK_S", 0.02)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    return store


def until(come):
    late = time.monotonic() + 20
    while not come():
        assert time.monotonic() < late
        time.sleep(0.01)


def test_messages_come_in_order_and_are_deleted_once_all_have_them(store):
    sender, receiver = Sender("a", patience_s=60), Receiver("a")
    sent = [f"{number}".encode() for number in range(2 * BLOCK + 5)]
    for each in sent:
        sender.send(each)
    assert [receiver.receive() for _ in sent[: BLOCK + 1]] == sent[: BLOCK + 1]
    told = []
    sender.watch(lost=told.append, leaving=told.append)
    until(lambda: not any(key.startswith("a/0/") for key in store.values))
    assert len([key for key in store.values if key.startswith("a/1/")]) == BLOCK
    assert [receiver.receive() for _ in sent[BLOCK + 1 :]] == sent[BLOCK + 1 :]
    # One that waits gets what comes later.
    late = threading.Timer(0.1, sender.send, (b"late",))
    late.start()
    assert receiver.receive() == b"late" and not told


def test_a_silent_process_is_lost_and_one_that_is_asked_to_end_says_so(
    store, monkeypatch
):
    lost, leaving = [], []
    sender = Sender("b", patience_s=0.5)
    # It takes as long as it likes to come.
    sender.watch(lost=lost.append, leaving=leaving.append)
    time.sleep(1.0)
    assert not lost
    receiver = Receiver("b")
    time.sleep(1.0)
    assert not lost and not leaving
    receiver.leaving = True
    until(lambda: leaving)
    monkeypatch.setattr(messages, "BEAT_S", 1000.0)
    until(lambda: lost)
    assert (lost, leaving) == ([1], [1])


def test_a_lost_process_0_is_an_error(store):
    receiver = Receiver("c")
    store.gone = True
    with pytest.raises(RuntimeError, match="process 0 of this job is lost"):
        receiver.receive()
