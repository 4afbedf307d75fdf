"""From what the engine tells to what a client is sent.

An `Assembler` is fed the engine's events of one request and gives chunks; when all
outputs have ended it gives the whole answer, which is what the chunks add up to.
Neither depends on how many tokens the engine tells at once.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from jaxspark.serving.choice import ChoiceReader, Part
from jaxspark.serving.engine_events import Ended, EngineEvent, Prefilled, Sampled
from jaxspark.serving.errors import ApiError
from jaxspark.serving.prepared import Prepared
from jaxspark.serving.responses import (
    LEAST_LOG_PROB,
    Answer,
    CompletionDetails,
    PromptDetails,
    TokenLogProb,
    TopLogProb,
    Usage,
)


class Assembler[A: Answer](ABC):
    """Assembles one answer."""

    def __init__(self, prepared: Prepared):
        self.prepared = prepared
        count = len(prepared.demands)
        self._readers = [ChoiceReader(prepared) for _ in range(count)]
        self._parts: list[list[Part]] = [[] for _ in range(count)]
        self._prefilled: list[Prefilled | None] = [None] * count
        self._begun = [False] * count
        self._finished = False

    @property
    def finished(self) -> bool:
        """Whether every output has ended."""
        return all(reader.ending for reader in self._readers)

    def wants(self, choice: int) -> bool:
        """Whether an output goes on; the engine may stop one that does not."""
        return self._readers[choice].ending is None

    def push(self, event: EngineEvent) -> list[A]:
        """The chunks that the engine's event completes; none for a whole answer.

        Raises:
          ApiError: an output failed; no answer will come.
        """
        choice, streams = event.choice, self.prepared.stream
        chunks = []
        if not self._begun[choice]:
            self._begun[choice] = True
            if isinstance(event, Prefilled):
                self._prefilled[choice] = event
            chunks += self._opening(choice) if streams else []
        if isinstance(event, Prefilled):
            parts = []
        elif isinstance(event, Ended):
            if event.reason == "error" and self.wants(choice):
                blamed = "server" if event.status >= 500 else "invalid_request"
                raise ApiError(
                    event.error or "the engine failed",
                    status=event.status,
                    type=f"{blamed}_error",
                )
            parts = self._readers[choice].end(event.reason)
        else:
            parts = self._readers[choice].push(event.tokens)
        for part in parts:
            self._parts[choice].append(part)
            chunks += self._chunks(choice, part) if streams else []
        if self.prepared.include_usage and self.finished and not self._finished:
            chunks.append(self._answer(choices=[], usage=self.usage()))
        self._finished = self.finished
        return chunks

    def usage(self) -> Usage:
        """Tokens so far; prompts count once, however many outputs they have."""
        first = range(0, len(self._readers), self.prepared.n)
        prompt = sum(len(self.prompt_ids(choice)) for choice in first)
        newest = [parts[-1] for parts in self._parts if parts]
        told = sum(part.told for part in newest)
        cached = (self._prefilled[choice] for choice in first)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=told,
            total_tokens=prompt + told,
            prompt_tokens_details=PromptDetails(
                cached_tokens=sum(each.cached for each in cached if each)
            ),
            completion_tokens_details=CompletionDetails(
                reasoning_tokens=sum(part.reasoning for part in newest)
            ),
        )

    def finish_reasons(self) -> list[str]:
        """Why outputs ended, of those that have."""
        return [each.ending.reason for each in self._readers if each.ending]

    @abstractmethod
    def answer(self) -> A:
        """The whole answer, once every output has ended."""

    @abstractmethod
    def _opening(self, choice: int) -> list[A]:
        """Chunks that go before anything an output says."""

    @abstractmethod
    def _chunks(self, choice: int, part: Part) -> list[A]:
        """A part as chunks."""

    @abstractmethod
    def _answer(self, **values: Any) -> A:
        """An answer or a chunk with these values."""

    # What answers and chunks consist of.

    def _head(self) -> dict[str, Any]:
        """The values that all have."""
        prepared = self.prepared
        head: dict[str, Any] = {
            "id": prepared.id,
            "created": prepared.created,
            "model": prepared.served.name,
        }
        if prepared.served.fingerprint:
            head["system_fingerprint"] = prepared.served.fingerprint
        return head

    def _chunk(self, choice: Any) -> A:
        values: dict[str, Any] = {"choices": [choice]}
        if self.prepared.continuous_usage:
            values["usage"] = self.usage()
        elif self.prepared.include_usage:
            values["usage"] = None
        return self._answer(**values)

    def prompt_ids(self, choice: int) -> Sequence[int]:
        """The tokens of an output's prompt."""
        ids = self.prepared.demands[choice].request.prompt
        assert not isinstance(ids, str)
        return ids

    def prompt_log_probs(self, choice: int) -> list[dict[str, Any] | None]:
        """Log-probabilities of the prompt's tokens, as vLLM tells them."""
        found: list[dict[str, Any] | None] = []
        for sampled in self._told_prompt(choice):
            if sampled.log_prob is None:
                found.append(None)
                continue
            ranked = {sampled.token: sampled.rank}
            ranked |= {token: i + 1 for i, (token, _) in enumerate(sampled.top)}
            entries = dict([*sampled.top, (sampled.token, sampled.log_prob)])
            found.append(
                {
                    str(token): {
                        "logprob": bounded(log_prob),
                        "rank": ranked.get(token),
                        "decoded_token": self.token_text(token),
                    }
                    for token, log_prob in entries.items()
                }
            )
        return found

    def _told_prompt(self, choice: int) -> Sequence[Sampled]:
        prefilled = self._prefilled[choice]
        return (prefilled.prompt if prefilled else None) or ()

    def token_text(self, token: int) -> str:
        """A token by itself."""
        return self.prepared.served.spelled(token)[0]

    def told(self, sampled: Sampled) -> TokenLogProb:
        """A token with its log-probability and those of likely ones."""
        text, spelled = self.prepared.served.spelled(sampled.token)
        return TokenLogProb(
            token=text,
            logprob=bounded(sampled.log_prob),
            bytes=spelled,
            top_logprobs=[self._likely(*each) for each in sampled.top],
        )

    def _likely(self, token: int, log_prob: float | None) -> TopLogProb:
        text, spelled = self.prepared.served.spelled(token)
        return TopLogProb(token=text, logprob=bounded(log_prob), bytes=spelled)


def bounded(log_prob: float | None) -> float:
    """A log-probability that JSON can say."""
    if log_prob is None:
        raise ValueError("the engine gave no log-probability, and one was asked for")
    return max(log_prob, LEAST_LOG_PROB)
