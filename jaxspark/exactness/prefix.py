"""Guarantee 4: a cache hit changes nothing.

A request is decoded on empty caches, then again after others have left what they share
with it: tokens, log-probabilities and what was accepted must be the same, to the last
bit. And whatever is submitted, cancelled, cached, evicted and preempted in whatever
order, every output is the one of plain decoding, and every page comes back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from flax import nnx

from jaxspark.configs.targets import deepseek_v4_tiny
from jaxspark.decoding import DecodeOptions
from jaxspark.decoding.couplings import Coupling
from jaxspark.drafters import Drafter
from jaxspark.exactness.audit import AuditResult, audit, plain_outputs
from jaxspark.exactness.tiny_models import DRAFTERS, Family, tiny_dense
from jaxspark.generation import Completion, ContinuousBatch, Request
from jaxspark.generation.slot_pages import SlotPages
from jaxspark.models import DeepSeekV4
from jaxspark.models.pages import PAGE
from jaxspark.parallel.mesh import slot_shards

VOCAB, BLOCK, NEW = 61, 4, 24
SLOTS, TOGETHER, CAPACITY = 3, 2, 640
# Fewer than all slots can fill: some requests give theirs up.
FEW_PAGES = 6
AUDITED: dict[Family, tuple[str, ...]] = {
    "dense": ("ngram", "dspark-gated", "eagle3", "hybrid-asks"),
    "deepseek_v4": ("ngram", "deepseek_v4_dspark", "mtp", "hybrid"),
}


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Where a prompt leaves what came before it.

    Attributes:
      shared: tokens that it shares with an earlier one.
      own: tokens behind them.
    """

    shared: int
    own: int


def alignments(windows: Sequence[int] = (16,)) -> list[Alignment]:
    """Around pages, compression windows, chunks and the edges of sliding windows."""
    edges = {0, 1, 2, 3, 4, 5, 31, 32, 33, 64, 127}
    for window in windows:
        edges |= {window - 1, window, window + 1}
    return [
        Alignment(shared=pages * PAGE + edge, own=own)
        for pages in (1, 2, 3)
        for index, edge in enumerate(sorted(edges))
        for own in [(1, 2, 33, 130)[(index + pages) % 4]]
    ]


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A request on empty caches, and on those that others have left.

    Attributes:
      name: of the case.
      cached: tokens of its prompt that were there.
      expected: those that had to be.
      rounds: of a cold start, then with the hit.
      differences: what is not the same, in words.
    """

    name: str
    cached: int
    expected: int
    rounds: tuple[int, int]
    differences: tuple[str, ...]


class PrefixAudit:
    """One target, one drafter, one batch whose caches are filled and emptied."""

    def __init__(
        self,
        target: Any,
        drafter: Drafter,
        *,
        chunk: int = 32,
        pages: int = SLOTS * CAPACITY // PAGE,
        coupling: Coupling = "gumbel",
        per_shard: int = SLOTS,
    ):
        """Empty caches on the mesh in use, if any.

        Args:
          target: a bare model.
          drafter: of its outputs.
          chunk: tokens by which prompts are read.
          pages: of each shard of slots.
          coupling: of rounds.
          per_shard: slots of each.
        """
        self.target, self.coupling = target, coupling
        self.slots = per_shard * slot_shards()
        self.pages = SlotPages(
            slots=self.slots,
            capacity=CAPACITY,
            pages=pages + 1,
            chunk=chunk,
            shards=slot_shards(),
            lookahead=drafter.lookahead,
        )
        self.batch = ContinuousBatch(
            target,
            drafter,
            slots=self.slots,
            capacity=CAPACITY,
            options=DecodeOptions(block_length=BLOCK, coupling=coupling),
            together=TOGETHER,
            chunk=chunk,
            log_probs=True,
            rounds_per_step=4,
            pages=self.pages,
        )

    def run(self, prompt: Sequence[int], seed: int = 0) -> tuple[Completion, int]:
        """One request by itself, and how many of its tokens were cached."""
        self.batch.submit(_request(prompt, seed))
        while True:
            for update in self.batch.step():
                if update.completion is not None:
                    return update.completion, update.cached

    def hits(self, case: Alignment, seed: int = 0) -> list[Hit]:
        """A request cold; after others that share its beginning; and once more."""
        random = np.random.default_rng(seed)
        begin = random.integers(0, VOCAB - 3, case.shared).tolist()
        own = random.integers(0, VOCAB - 3, case.own - 1).tolist()
        prompt = [*begin, VOCAB - 1, *own]
        other = random.integers(0, VOCAB - 3, 40).tolist()
        self.pages.forget()
        cold, nothing = self.run(prompt, seed)
        assert nothing == 0
        self.pages.forget()
        # Where there are rings, the second finds out where prompts part.
        for token in (VOCAB - 2, VOCAB - 3):
            self.run([*begin, token, *other])
        name = f"{case.shared} + {case.own}"
        shared = case.shared - self.pages.lookahead
        return [
            self._hit(
                f"{name}, {what}", prompt, seed, cold, min(known, len(prompt) - 1)
            )
            for what, known in (("part", shared), ("again", len(prompt)))
        ]

    def _hit(self, name, prompt, seed, cold, known) -> Hit:
        seen, cached = self.run(prompt, seed)
        unit = self.pages.unit
        differences = [
            f"{name}: {what} {before} cold, {after} with a hit"
            for what, before, after in (
                ("tokens", cold.tokens, seen.tokens),
                ("log-probs", cold.log_probs, seen.log_probs),
                ("accepted", cold.accepted, seen.accepted),
            )
            if before != after
        ]
        expected = known // PAGE * PAGE // unit * unit
        if cached != expected:
            differences.append(f"{name}: {cached} tokens cached, expected {expected}")
        return Hit(
            name=name,
            cached=cached,
            expected=expected,
            rounds=(cold.rounds, seen.rounds),
            differences=tuple(differences),
        )

    @cached_property
    def requests(self) -> list[Request]:
        """Requests that share beginnings, and reach new pages in their outputs."""
        random = np.random.default_rng(0)
        begin = random.integers(0, VOCAB, 3 * PAGE).tolist()
        requests = []
        for index, (shared, length) in enumerate(
            [(0, 5), (0, 120), (128, 240), (128, 243), (200, 250), (256, 370)]
            + [(256, 376), (384, 390), (130, 131), (384, 498), (0, 244), (31, 245)]
        ):
            own = random.integers(0, VOCAB, length - shared).tolist()
            requests.append(_request(begin[:shared] + own, index))
        return requests

    @cached_property
    def plain(self) -> list[list[int]]:
        """What plain decoding says."""
        return plain_outputs(
            self.target, self.requests, coupling=self.coupling, capacity=CAPACITY
        )

    def sequence(self, seed: int) -> tuple[AuditResult, int, list[str]]:
        """Requests that come, go, and are cancelled at random.

        Returns:
          Outputs against plain decoding's, how often one gave its pages up, and what
          pages were lost, in words.
        """
        random = np.random.default_rng(seed)
        batch, before = self.batch, self.batch.preemptions
        asked: dict[int, int] = {}
        ended: dict[int, Completion] = {}

        def step():
            for update in batch.step(int(random.integers(1, 5))):
                if update.completion is not None:
                    ended[update.index] = update.completion

        for _ in range(30):
            alive = [index for index in asked if index not in ended]
            if random.random() < 0.5 and len(alive) < 2 * self.slots:
                which = int(random.integers(len(self.requests)))
                asked[batch.submit(self.requests[which])] = which
            elif random.random() < 0.1 and alive:
                batch.cancel(int(random.choice(alive)))
            elif random.random() < 0.03:
                self.pages.forget()
            step()
        while not batch.idle:
            step()
        result = AuditResult()
        for index, completion in ended.items():
            plain = self.plain[asked[index]]
            if completion.finish_reason == "cancelled":
                plain = plain[: len(completion.tokens)]
            request = self.requests[asked[index]]
            result += audit(self.target, [request], [plain], [completion])
        lost = [f"no end of request {index}" for index in set(asked) - set(ended)]
        return result, batch.preemptions - before, lost + self.pages.leaks()


def audited_pair(family: Family, drafter: str) -> tuple[Any, Drafter]:
    """A random target, for V4 `deepseek_v4_tiny`, and a drafter for it."""
    if family == "dense":
        target: Any = tiny_dense(VOCAB)
    else:
        target = DeepSeekV4(deepseek_v4_tiny(VOCAB), rngs=nnx.Rngs(0))
        target.embed_tokens.weight[...] *= 30.0
    return target, DRAFTERS[family][drafter](target, 1, BLOCK)


def _request(prompt: Sequence[int], seed: int) -> Request:
    return Request(
        list(prompt),
        max_new_tokens=NEW,
        temperature=(0.0, 0.8, 1.3)[seed % 3],
        seed=seed,
        stop_ids=(),
        log_probs=True,
        name=str(seed),
    )
