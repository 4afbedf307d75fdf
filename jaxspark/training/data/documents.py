"""Conversations as token ids; the tokens a drafter is trained to predict are marked."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Bool, Int

from jaxspark.jsonlines import MalformedRow, first_reasons
from jaxspark.text import Tokenizer
from jaxspark.training.data.conversations import Conversation


@dataclass(frozen=True)
class Document:
    """One conversation.

    Attributes:
      ids_L: its tokens.
      trainable_L: whether a token is part of an answer.
    """

    ids_L: Int[np.ndarray, " L"]
    trainable_L: Bool[np.ndarray, " L"]


def encode(tokenizer: Tokenizer, conversation: Conversation) -> Document:
    """Applies the chat template; the assistant's tokens are trainable.

    An answer ends with its first stop token, where generation stops too; what the
    template writes after it is not the assistant's. A first message by the assistant
    answers nothing and is context. Where `answer_ids` are known, the last answer is
    these very ids.

    Raises:
      ValueError: no answer, answer ids that are not the answer's text, or a template
        that refuses the messages or rewrites earlier ones when later ones follow;
        names the file and line.
    """
    ids: list[int] = []
    trainable: list[bool] = []
    messages = conversation.messages
    last = len(messages) - 1
    chat = partial(tokenizer.chat, tools=conversation.tools)
    try:
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index == 0:
                continue
            prompt = chat(messages[:index])
            if index == last and conversation.answer_ids is not None:
                answer = list(conversation.answer_ids)
                _check_answer(tokenizer, answer, message["content"] or "")
            else:
                whole = chat(messages[: index + 1], add_generation_prompt=False)
                if whole[: len(prompt)] != prompt:
                    raise ValueError("the template rewrites the prompt of an answer")
                answer = _up_to_stop(whole[len(prompt) :], tokenizer.stop_ids)
            if prompt[: len(ids)] != ids:
                raise ValueError("the template rewrites earlier messages")
            between = prompt[len(ids) :]
            ids += between + answer
            trainable += [False] * len(between) + [True] * len(answer)
    except Exception as error:  # Templates raise whatever they like.
        raise ValueError(f"{conversation.where}: {error}") from error
    if not ids:
        raise ValueError(
            f"{conversation.where}: no message by the assistant that answers one"
        )
    return Document(np.array(ids, np.int32), np.array(trainable))


def _check_answer(tokenizer: Tokenizer, ids: list[int], text: str) -> None:
    """Ids of another tokenizer would train a drafter for nothing."""
    if (seen := tokenizer.decode(ids)) != text:
        raise ValueError(
            f"answer_ids say {seen[:40]!r}, the message {text[:40]!r}; were they made "
            "with another tokenizer? Without answer_ids the text is encoded anew"
        )


def _up_to_stop(ids: list[int], stop_ids: Iterable[int]) -> list[int]:
    for place, token in enumerate(ids):
        if token in stop_ids:
            return ids[: place + 1]
    return ids


def read_documents(
    tokenizer: Tokenizer,
    conversations: Iterable[Conversation | MalformedRow],
    *,
    max_tokens: int,
    vocab_size: int | None = None,
) -> tuple[list[Document], int, list[MalformedRow]]:
    """Conversations as documents; one that is no good ends nothing.

    Args:
      tokenizer: with a chat template.
      conversations: what to encode.
      max_tokens: longer documents are cut.
      vocab_size: how many tokens the target has.

    Returns:
      The documents in order; how many were cut; and what was dropped: lines that are no
      conversation, that the template refuses, that hold a token the target does not
      have, or whose answers `max_tokens` leaves out.

    Raises:
      ValueError: no document is left; names the first reasons.
    """
    documents: list[Document] = []
    dropped: list[MalformedRow] = []
    cut = 0
    for each in conversations:
        if isinstance(each, MalformedRow):
            dropped.append(each)
            continue
        try:
            document = encode(tokenizer, each)
            _check_vocabulary(document, vocab_size)
        except ValueError as error:
            reason = str(error).removeprefix(f"{each.where}: ")
            dropped.append(MalformedRow(each.where, reason))
            continue
        if len(document.ids_L) > max_tokens:
            cut += 1
            document = Document(
                document.ids_L[:max_tokens], document.trainable_L[:max_tokens]
            )
        # An anchor and its label must both be part of an answer.
        if np.any(document.trainable_L[:-1] & document.trainable_L[1:]):
            documents.append(document)
        else:
            reason = f"no answer of two tokens within {max_tokens}"
            dropped.append(MalformedRow(each.where, reason))
    if not documents:
        raise ValueError(
            "the data hold no answer of at least two tokens"
            + (f"; dropped: {first_reasons(dropped)}" if dropped else "")
        )
    return documents, cut, dropped


def _check_vocabulary(document: Document, vocab_size: int | None) -> None:
    largest = document.ids_L.max()
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(f"holds token {largest}, the target has {vocab_size} tokens")
