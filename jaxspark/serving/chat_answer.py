"""Answers to chats: messages with reasoning and calls, whole or as deltas."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from jaxspark.serving.assembler import Assembler
from jaxspark.serving.choice import Part
from jaxspark.serving.engine_events import Sampled
from jaxspark.serving.prepared import Prepared
from jaxspark.serving.responses import (
    ChatAnswer,
    ChatChoice,
    ChatLogProbs,
    Message,
    SentCall,
    SentFunction,
)
from jaxspark.text.events import (
    Arguments,
    CallBegins,
    CallEnds,
    Content,
    Event,
    Reasoning,
)


class ChatAssembler(Assembler[ChatAnswer]):
    """Assembles the answer to a chat."""

    def __init__(self, prepared: Prepared):
        super().__init__(prepared)
        # Calls that each output has begun.
        self._calls = [0] * len(prepared.demands)

    def answer(self) -> ChatAnswer:
        """The whole answer, once every output has ended."""
        values: dict[str, Any] = {
            "choices": [self._whole(i) for i in range(len(self._parts))],
            "usage": self.usage(),
        }
        if self.prepared.return_ids:
            values["prompt_token_ids"] = list(self.prompt_ids(0))
        if self.prepared.prompt_log_probs is not None:
            values["prompt_logprobs"] = self.prompt_log_probs(0)
        return self._answer("chat.completion", **values)

    def _answer(self, object: str = "chat.completion.chunk", **values: Any):
        return ChatAnswer(object=object, **self._head(), **values)

    def _opening(self, choice: int) -> list[ChatAnswer]:
        delta = Message(role="assistant", content="")
        chunk = self._chunk(
            ChatChoice(index=choice, delta=delta, logprobs=None, finish_reason=None)
        )
        if self.prepared.return_ids:
            chunk.prompt_token_ids = list(self.prompt_ids(choice))
        if self.prepared.prompt_log_probs is not None:
            chunk.prompt_logprobs = self.prompt_log_probs(choice)
        return [chunk]

    def _chunks(self, choice: int, part: Part) -> list[ChatAnswer]:
        """What a part says, and by itself how it ended."""
        chunks, tokens = [], part.tokens
        if part.events:
            delta = self._delta(choice, part.events)
            chunks.append(
                ChatChoice(
                    index=choice, delta=delta, **self._by(tokens), finish_reason=None
                )
            )
            tokens = []
        if part.ending:
            chunks.append(
                ChatChoice(
                    index=choice,
                    delta=Message(),
                    **self._by(tokens),
                    finish_reason=part.ending.reason,
                    stop_reason=part.ending.stop,
                )
            )
        return [self._chunk(each) for each in chunks]

    def _by(self, tokens: Sequence[Sampled]) -> dict[str, Any]:
        """What is told of tokens."""
        told: dict[str, Any] = {"logprobs": None}
        if self.prepared.log_probs is not None and tokens:
            told["logprobs"] = ChatLogProbs(content=[self.told(t) for t in tokens])
        if self.prepared.return_ids:
            told["token_ids"] = [each.token for each in tokens]
        if self.prepared.return_drafted:
            told["drafted"] = [each.accepted for each in tokens]
        return told

    def _delta(self, choice: int, events: Iterable[Event]) -> Message:
        delta, calls = Message(), list[SentCall]()
        for event in events:
            match event:
                case Content(text):
                    delta.content = (delta.content or "") + text
                case Reasoning(text):
                    delta.reasoning = (delta.reasoning or "") + text
                case CallBegins(name):
                    number = self._calls[choice]
                    self._calls[choice] += 1
                    calls.append(
                        SentCall(
                            index=number,
                            id=self._call_id(choice, number),
                            type="function",
                            function=SentFunction(name=name, arguments=""),
                        )
                    )
                case Arguments(text):
                    running = self._calls[choice] - 1
                    if not calls or calls[-1].index != running:
                        more = SentFunction(arguments="")
                        calls.append(SentCall(index=running, function=more))
                    function = calls[-1].function
                    assert function is not None
                    function.arguments = (function.arguments or "") + text
                case CallEnds():
                    pass
        if calls:
            delta.tool_calls = calls
        return delta

    def _call_id(self, choice: int, number: int) -> str:
        """An id that no other call has, and the same one whenever it is asked for."""
        name = f"{self.prepared.id}/{self.prepared.created}/{choice}/{number}"
        return f"call_{hashlib.sha256(name.encode()).hexdigest()[:24]}"

    def _whole(self, choice: int) -> ChatChoice:
        parts = self._parts[choice]
        ending = self._readers[choice].ending
        if ending is None:
            raise ValueError(f"output {choice} has not ended; there is no answer yet")
        self._calls[choice] = 0
        said = self._delta(choice, (event for part in parts for event in part.events))
        message = Message(role="assistant", content=said.content)
        if said.reasoning:
            message.reasoning = said.reasoning
        if said.tool_calls:
            message.tool_calls = [
                SentCall(id=call.id, type="function", function=call.function)
                for call in said.tool_calls
            ]
        if message.content is None and not (said.reasoning or said.tool_calls):
            message.content = ""
        tokens = [token for part in parts for token in part.tokens]
        told = self._by(tokens)
        if self.prepared.log_probs is not None and told["logprobs"] is None:
            told["logprobs"] = ChatLogProbs(content=[])
        return ChatChoice(
            index=choice,
            message=message,
            **told,
            finish_reason=ending.reason,
            stop_reason=ending.stop,
        )
