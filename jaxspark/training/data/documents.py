"""Conversations as token ids; the tokens a drafter is trained to predict are marked."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from jaxspark.text import Tokenizer
from jaxspark.training.data.conversations import Conversation, Problem


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
    try:
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index == 0:
                continue
            prompt = tokenizer.chat(messages[:index])
            if index == last and conversation.answer_ids is not None:
                answer = list(conversation.answer_ids)
                _check_answer(tokenizer, answer, message["content"])
            else:
                whole = tokenizer.chat(
                    messages[: index + 1], add_generation_prompt=False
                )
                if whole[: len(prompt)] != prompt:
                    raise ValueError("the template rewrites the prompt of an answer")
                answer = _up_to_stop(whole[len(prompt) :], tokenizer.stop_ids)
            if prompt[: len(ids)] != ids:
                raise ValueError("the template rewrites earlier messages")
            between = prompt[len(ids) :]
            ids += between + answer
            trainable += [False] * len(between) + [True] * len(answer)
    except ValueError as error:
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
    conversations: Iterable[Conversation | Problem],
    *,
    max_tokens: int,
    vocab_size: int | None = None,
) -> tuple[list[Document], int]:
    """All documents in order, and how many were cut to `max_tokens`.

    A document of which no answer is left is passed over.

    Raises:
      ValueError: a line that is no conversation, one the template refuses, or one with
        a token that a target of `vocab_size` does not have.
    """
    documents, cut = [], 0
    for each in conversations:
        if isinstance(each, Problem):
            raise ValueError(str(each))
        document = encode(tokenizer, each)
        if vocab_size is not None and document.ids_L.max() >= vocab_size:
            raise ValueError(
                f"{each.where}: holds token {document.ids_L.max()}, the target has "
                f"{vocab_size} tokens"
            )
        if len(document.ids_L) > max_tokens:
            cut += 1
            document = Document(
                document.ids_L[:max_tokens], document.trainable_L[:max_tokens]
            )
        # An anchor and its label must both be part of an answer.
        if np.any(document.trainable_L[:-1] & document.trainable_L[1:]):
            documents.append(document)
    if not documents:
        raise ValueError("the data hold no answer of at least two tokens")
    return documents, cut
