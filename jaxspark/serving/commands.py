"""What a batch is told before a call; on several processes, what process 0 tells all.

Whatever a clock, a client or chance has a part in is decided once, by process 0: who
arrives, with which seed, who leaves, how many rounds follow. All else that a host does
(which slot, which pages, who gives them up, what a grammar allows) follows from that
and from tokens, which every process reads alike. `ContinuousBatch.decisions` tells
whether it did: a process that parted from the others ends, rather than computing
something else beside them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jaxspark.generation import ContinuousBatch, Request, SamplingParams, Update
from jaxspark.generation.request import CheckedRequest, check
from jaxspark.grammars import Calls, Grammar, StructuralTags, Tag
from jaxspark.text.thinking import ThinkFormat

# Instead of a command: there are no more.
STOP = b"stop"


@dataclass(frozen=True, kw_only=True)
class Command:
    """One call of `ContinuousBatch.step`, and what comes before it.

    Attributes:
      arriving: requests that get slots, each with its salt.
      unwanted: indices of requests that leave theirs.
      rounds: most rounds.
      decisions: of the batch so far; told to others, 0 where there are none.
    """

    arriving: Sequence[tuple[CheckedRequest, str | None]]
    unwanted: Sequence[int]
    rounds: int
    decisions: int = 0

    def apply(self, batch: ContinuousBatch) -> list[Update]:
        """Does it; every process of a job does the same."""
        for request, salt in self.arriving:
            batch.enqueue(request, salt)
        for index in self.unwanted:
            batch.cancel(index)
        return batch.step(self.rounds, max_finished=1)

    def encode(self) -> bytes:
        """As a message."""
        return json.dumps(
            {
                "arriving": [[*_told(each), salt] for each, salt in self.arriving],
                "unwanted": self.unwanted,
                "rounds": self.rounds,
                "decisions": self.decisions,
            },
            # Numbers of NumPy's, which callers of the engine may have.
            default=lambda value: value.item(),
        ).encode()

    @classmethod
    def decode(cls, message: bytes, batch: ContinuousBatch) -> "Command":
        """A message's, for a batch that has come as far as the one it is from.

        Raises:
          RuntimeError: it is elsewhere.
        """
        told = json.loads(message)
        if batch.decisions != told["decisions"]:
            raise RuntimeError("this process has decided otherwise than process 0")
        arriving = []
        for index, ids, params, salt in told.pop("arriving"):
            request = Request(ids, _params(params))
            checked = check(request, index, batch.target, batch.limits)
            arriving.append((checked, salt))
        return cls(arriving=arriving, **told)


def _told(request: CheckedRequest) -> tuple[int, list[int], dict[str, Any]]:
    return request.index, request.ids, asdict(request.params)


def _params(told: Mapping[str, Any]) -> SamplingParams:
    """JSON has texts for keys, and no types."""
    bias = told["logit_bias"]
    ids = None if bias is None else {int(token): bias[token] for token in bias}
    grammar = _grammar(told["grammar"])
    return SamplingParams(**{**told, "logit_bias": ids, "grammar": grammar})


def _grammar(told: Mapping[str, Any] | None) -> Grammar | None:
    if told is None:
        return None
    value, thinking, calls = told["value"], told["thinking"], told["calls"]
    if told["kind"] == "calls":
        value = Calls(**value)
    elif told["kind"] == "structural_tag":
        tags = [Tag(**each) for each in value["structures"]]
        value = StructuralTags(structures=tags, triggers=value["triggers"])
    return Grammar(
        kind=told["kind"],
        value=value,
        thinking=None if thinking is None else ThinkFormat(**thinking),
        opened=told["opened"],
        calls=None if calls is None else Calls(**calls),
    )
