"""Answers to completions: plain text, whole or in pieces, after its prompt if asked."""

from collections.abc import Sequence
from typing import Any

from jaxspark.serving.assembler import Assembler, bounded
from jaxspark.serving.choice import Part
from jaxspark.serving.engine_events import Sampled
from jaxspark.serving.prepared import Prepared
from jaxspark.serving.responses import (
    CompletionAnswer,
    CompletionChoice,
    CompletionLogProbs,
)
from jaxspark.text import Output, ReadOptions
from jaxspark.text.events import Content


class CompletionAssembler(Assembler[CompletionAnswer]):
    """Assembles the answer to a completion."""

    def __init__(self, prepared: Prepared):
        super().__init__(prepared)
        self._prompts: dict[int, str] = {}

    def answer(self) -> CompletionAnswer:
        """The whole answer, once every output has ended."""
        choices = [self._whole(i) for i in range(len(self._parts))]
        return self._answer(choices=choices, usage=self.usage())

    def _answer(self, **values: Any) -> CompletionAnswer:
        return CompletionAnswer(object="text_completion", **self._head(), **values)

    def _opening(self, choice: int) -> list[CompletionAnswer]:
        """The prompt, as far as anything of it is told."""
        told = self._of_prompt(choice)
        text = self._echoed(choice)
        if not told and not text:
            return []
        opening = {"text": text, "logprobs": self._prompt_entries(choice)}
        values = {"index": choice, **opening, "finish_reason": None, **told}
        return [self._chunk(CompletionChoice(**values))]

    def _chunks(self, choice: int, part: Part) -> list[CompletionAnswer]:
        values: dict[str, Any] = {
            "index": choice,
            "text": _text([part]),
            "logprobs": self._entries(choice, [part]),
            "finish_reason": part.ending.reason if part.ending else None,
        }
        if part.ending:
            values["stop_reason"] = part.ending.stop
        if self.prepared.return_ids:
            values["token_ids"] = [each.token for each in part.tokens]
        if self.prepared.return_drafted:
            values["drafted"] = [each.accepted for each in part.tokens]
        return [self._chunk(CompletionChoice(**values))]

    def _whole(self, choice: int) -> CompletionChoice:
        parts = self._parts[choice]
        ending = self._readers[choice].ending
        if ending is None:
            raise ValueError(f"output {choice} has not ended; there is no answer yet")
        values: dict[str, Any] = {
            "index": choice,
            "text": self._echoed(choice) + _text(parts),
            "logprobs": self._entries(choice, parts, echoed=True),
            "finish_reason": ending.reason,
            "stop_reason": ending.stop,
        }
        if self.prepared.return_ids:
            values["token_ids"] = [t.token for part in parts for t in part.tokens]
        if self.prepared.return_drafted:
            values["drafted"] = [t.accepted for part in parts for t in part.tokens]
        return CompletionChoice(**values, **self._of_prompt(choice))

    def _of_prompt(self, choice: int) -> dict[str, Any]:
        """What is told of the prompt beside its text."""
        told: dict[str, Any] = {}
        if self.prepared.return_ids:
            told["prompt_token_ids"] = list(self.prompt_ids(choice))
        if self.prepared.prompt_log_probs is not None:
            told["prompt_logprobs"] = self.prompt_log_probs(choice)
        return told

    def _echoed(self, choice: int) -> str:
        if not self.prepared.echo:
            return ""
        if choice not in self._prompts:
            self._prompts[choice] = self.prepared.served.tokenizer.decode(
                self.prompt_ids(choice), skip_special=self.prepared.reading.skip_special
            )
        return self._prompts[choice]

    def _entries(
        self, choice: int, parts: Sequence[Part], *, echoed: bool = False
    ) -> CompletionLogProbs | None:
        """Log-probabilities of parts, behind those of the prompt if it is echoed."""
        if self.prepared.log_probs is None:
            return None
        start = len(self._echoed(choice))
        tokens = [token for part in parts for token in part.tokens]
        offsets = [start + at for part in parts for at in part.offsets]
        entries = self._listed(tokens, offsets)
        before = self._prompt_entries(choice) if echoed else None
        if before is not None:
            for name in CompletionLogProbs.model_fields:
                getattr(entries, name)[:0] = getattr(before, name)
        return entries

    def _prompt_entries(self, choice: int) -> CompletionLogProbs | None:
        if not self.prepared.echo or self.prepared.log_probs is None:
            return None
        sampled = self._told_prompt(choice)
        options = ReadOptions(skip_special=self.prepared.reading.skip_special)
        output = Output(self.prepared.served.tokenizer, options)
        for each in sampled:
            output.push(each.token)
        output.finish()
        return self._listed(sampled, [0, *output.ends][: len(sampled)])

    def _listed(
        self, tokens: Sequence[Sampled], offsets: Sequence[int]
    ) -> CompletionLogProbs:
        """Entries in OpenAI's older form: lists side by side."""
        return CompletionLogProbs(
            tokens=[self.token_text(each.token) for each in tokens],
            token_logprobs=[
                None if each.log_prob is None else bounded(each.log_prob)
                for each in tokens
            ],
            top_logprobs=[
                None if each.log_prob is None else self._likely_by_text(each)
                for each in tokens
            ],
            text_offset=list(offsets),
        )

    def _likely_by_text(self, sampled: Sampled) -> dict[str, float]:
        """Likely tokens, and the token itself if it is none of them."""
        likely = (*sampled.top, (sampled.token, sampled.log_prob))
        return {self.token_text(t): bounded(log_prob) for t, log_prob in likely}


def _text(parts: Sequence[Part]) -> str:
    return "".join(
        event.text
        for part in parts
        for event in part.events
        if isinstance(event, Content)
    )
