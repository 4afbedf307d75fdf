"""Answers written by the target itself, which is what a drafter has to predict.

Each conversation keeps its first turn; the target answers it. Later turns are dropped:
they reply to an answer that somebody else gave.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from jaxspark.generation import Request, SamplingParams, generate_stream
from jaxspark.generation.request import check_ids
from jaxspark.jsonlines import MalformedRow
from jaxspark.text.looping import is_looping
from jaxspark.training.data.conversations import Conversation


@dataclass(frozen=True, kw_only=True)
class Regenerated:
    """A conversation whose answer the target wrote.

    Attributes:
      conversation: first turn and answer.
      key: of the first turn, see `Conversation.key`.
      finish_reason: "stop", or "length" where the answer was cut.
    """

    conversation: Conversation
    key: str
    finish_reason: str

    def entry(self) -> dict[str, Any]:
        """The JSON object that files of answers hold."""
        spoken = self.conversation
        kept = {
            "key": self.key,
            "domain": spoken.domain,
            "source": spoken.source,
            "finish_reason": self.finish_reason,
            "messages": list(spoken.messages),
            "answer_ids": list(spoken.answer_ids or ()),
        }
        return kept | ({"tools": spoken.tools} if spoken.tools else {})


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A conversation that gave no training example, and why."""

    key: str
    where: str
    reason: str


def regenerate(
    target,
    conversations: Iterable[Conversation | MalformedRow],
    *,
    done: Iterable[str] = (),
    slots: int = 64,
    max_prompt_tokens: int = 192,
    max_new_tokens: int = 192,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[Regenerated | Dropped]:
    """Yields one result for every conversation whose key is not in `done`.

    Dropped are malformed lines, prompts that the template refuses or that are too long,
    empty answers and answers that end in a loop; a prompt that comes again is passed
    over. The answer to a prompt depends on `seed` and the prompt alone.

    Args:
      target: a loaded `Target` with a tokenizer.
      conversations: what to answer.
      done: keys to pass over.
      slots: requests decoded together.
      max_prompt_tokens: longest prompt, in tokens.
      max_new_tokens: answers are cut here.
      temperature: of sampling; 0 is greedy.
      top_p: of sampling.
      seed: of sampling.

    Raises:
      ValueError: the target has too few positions for any prompt and its answer.
    """
    room = target.model.config.max_position_embeddings - max_new_tokens
    if room < 1:
        raise ValueError(
            f"answers of {max_new_tokens} tokens leave no room for a prompt: the "
            f"target has {room + max_new_tokens} positions"
        )
    longest = min(max_prompt_tokens, room)
    seen = set(done)
    waiting: dict[int, Conversation] = {}
    dropped: list[Dropped] = []

    def requests() -> Iterator[Request]:
        index = 0
        for each in conversations:
            if isinstance(each, MalformedRow):
                if each.where not in seen:
                    # It has no text to be known by.
                    dropped.append(
                        Dropped(key=each.where, where=each.where, reason=each.reason)
                    )
                continue
            key = each.key
            if key in seen:
                continue
            seen.add(key)
            try:
                prompt = _prompt(target, each, longest)
            except Exception as error:  # Templates raise whatever they like.
                dropped.append(Dropped(key=key, where=each.where, reason=str(error)))
                continue
            waiting[index] = each
            index += 1
            params = SamplingParams(
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=(seed + int(each.key[:8], 16)) % 2**32,
            )
            yield Request(prompt, params)

    stream = generate_stream(
        target,
        requests(),
        slots=slots,
        capacity=max_prompt_tokens + max_new_tokens,
        max_stop_ids=max(1, len(target.stop_ids)),
    )
    for index, completion in stream:
        while dropped:
            yield dropped.pop()
        asked = waiting.pop(index)
        stopped = completion.finish_reason == "stop"
        reason = completion.error or _reason_to_drop(completion.tokens, stopped)
        if reason:
            yield Dropped(key=asked.key, where=asked.where, reason=reason)
            continue
        answer = {"role": "assistant", "content": completion.text or ""}
        yield Regenerated(
            conversation=Conversation(
                messages=(*asked.first_turn, answer),
                tools=asked.tools,
                domain=asked.domain,
                source=asked.source,
                answer_ids=tuple(completion.tokens),
                where=asked.where,
            ),
            key=asked.key,
            finish_reason=completion.finish_reason,
        )
    yield from dropped


def _prompt(target, conversation: Conversation, most: int) -> list[int]:
    if not conversation.first_turn:
        raise ValueError("no message by the user")
    prompt = target.tokenizer.chat(conversation.first_turn, tools=conversation.tools)
    if not prompt:
        raise ValueError("empty prompt")
    check_ids(target, "prompt", prompt)
    if len(prompt) > most:
        raise ValueError(f"prompt of {len(prompt)} tokens, the limit is {most}")
    return prompt


def _reason_to_drop(tokens: list[int], stopped: bool) -> str | None:
    if len(tokens) <= stopped:
        return "empty answer"
    if is_looping(tokens[:-1] if stopped else tokens):
        return "the answer loops"
    return None
