"""Messages from process 0 of a job to all others, and word back that they are there.

They go through the coordinator, at which JAX's processes meet: about half a millisecond
each, and no device takes part. A broadcast over the devices takes two to eight times as
long, and would be a collective that is open for as long as there is nothing to say.

Process 0 hears from everybody every second. So it knows of a lost process while JAX's
runtime still has patience: that would abort it, without a word to those it serves.
"""

import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

# Not public, but there is no other way to the coordinator's store of values.
from jax._src.distributed import global_state

log = logging.getLogger(__name__)
# Messages whose keys are deleted together, once everybody has them.
BLOCK = 256
BEAT_S = 1.0
# A receiver looks up so often, for instance at signals.
LOOK_S = 1.0


class Sender:
    """Process 0's side."""

    def __init__(self, topic: str, *, patience_s: float):
        """Nothing is sent yet.

        Args:
          topic: begins the keys; one sender of a job uses it.
          patience_s: after which a process is lost that has been heard of before.
        """
        self._client = _client()
        self._topic, self._patience_s = topic, patience_s
        self._sent = self._deleted = 0

    def send(self, message: bytes) -> None:
        """Sends to all; they receive in order."""
        self._client.key_value_set_bytes(_key(self._topic, self._sent), message)
        self._sent += 1

    def watch(
        self, *, lost: Callable[[int], None], leaving: Callable[[int], None]
    ) -> None:
        """Looks after the others from now on, in a thread.

        Args:
          lost: is told of the first process that is, and then nothing more comes.
          leaving: is told of every process that was asked to end.
        """
        threading.Thread(
            target=self._watch, args=(lost, leaving), name="watch", daemon=True
        ).start()

    def _watch(self, lost: Callable[[int], None], leaving: Callable[[int], None]):
        others = range(1, jax.process_count())
        heard: dict[int, tuple[float, int]] = {}
        told: set[int] = set()
        while True:
            time.sleep(min(BEAT_S, self._patience_s / 4))
            now, received = time.monotonic(), self._sent
            for each in others:
                word = self._word(each)
                since, beat = heard.get(each, (now, -1))
                if word is None:
                    received = 0
                else:
                    received = min(received, word["received"])
                    if word["leaving"] and each not in told:
                        told.add(each)
                        leaving(each)
                    if word["beat"] != beat:
                        since, beat = now, word["beat"]
                if beat >= 0:
                    heard[each] = since, beat
                if now - since > self._patience_s:
                    lost(each)
                    return
            self._delete(received)

    def _word(self, process: int) -> dict[str, Any] | None:
        """What a process said last, if anything."""
        try:
            said = self._client.key_value_try_get_bytes(_word_key(self._topic, process))
        except jax.errors.JaxRuntimeError:
            return None  # Not yet.
        return json.loads(said)

    def _delete(self, received: int) -> None:
        """Deletes what everybody has received."""
        while self._deleted + BLOCK <= received:
            self._client.key_value_delete(_folder(self._topic, self._deleted))
            self._deleted += BLOCK


class Receiver:
    """The side of every other process.

    Attributes:
      leaving: whether this process was asked to end; process 0 is told.
    """

    def __init__(self, topic: str):
        """From now on process 0 hears that this process is there."""
        self.leaving = False
        self._client = _client()
        self._topic, self._received = topic, 0
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def receive(self) -> bytes:
        """The next message, however long it takes to come.

        Raises:
          RuntimeError: process 0 is lost.
        """
        while (message := self.peek()) is None:
            pass
        self._received += 1
        return message

    def peek(self) -> bytes | None:
        """The next message, which stays the next; None if none comes for a while.

        Raises:
          RuntimeError: process 0 is lost.
        """
        try:
            return self._client.blocking_key_value_get_bytes(
                _key(self._topic, self._received), int(1000 * LOOK_S)
            )
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise RuntimeError("process 0 of this job is lost") from error
            return None

    def _beat(self) -> None:
        beat = 0
        while True:
            word = {"beat": beat, "received": self._received, "leaving": self.leaving}
            try:
                self._client.key_value_set_bytes(
                    _word_key(self._topic, jax.process_index()),
                    json.dumps(word).encode(),
                    allow_overwrite=True,
                )
            except jax.errors.JaxRuntimeError as error:
                log.warning("process 0 does not hear: %s", error)
            beat += 1
            time.sleep(BEAT_S)


def _client() -> Any:
    assert global_state.client is not None, "this process belongs to no job"
    return global_state.client


def _folder(topic: str, number: int) -> str:
    return f"{topic}/{number // BLOCK}/"


def _key(topic: str, number: int) -> str:
    return f"{_folder(topic, number)}{number}"


def _word_key(topic: str, process: int) -> str:
    return f"{topic}/words/{process}"
