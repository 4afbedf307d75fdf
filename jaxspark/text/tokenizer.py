"""Text <-> token ids, and conversations as prompts.

The work is done by transformers' tokenizer classes, for which tokenizer files and chat
templates are written: what they do is what a model has seen in training. Special tokens
are recognized inside text, so a rendered template becomes control tokens.

A chat template comes from the checkpoint, so it is untrusted: transformers renders it
in Jinja's sandbox, with plain data and a few harmless functions.
"""

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer as Core

from jaxspark.errors import CheckpointError
from jaxspark.text.stream import TextStream
from jaxspark.text.transformers_library import quiet_transformers

Message = Mapping[str, Any]
# Makes a conversation's prompt, with control tokens as text. It is called with `tools`,
# `add_generation_prompt`, `continue_final_message` and the caller's own variables.
ChatEncoder = Callable[..., str]


class Tokenizer:
    """A checkpoint's tokenizer.

    Attributes:
      hf: the transformers tokenizer.
      stop_ids: ids that end a text, in the checkpoint's order.
      chat_encoder: makes prompts of conversations where there is no chat template; None
        if it cannot be done.
    """

    def __init__(
        self,
        hf: Any = None,
        *,
        core: Core | None = None,
        stop_ids: Iterable[int] = (),
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | Mapping[str, str] | None = None,
        chat_encoder: ChatEncoder | None = None,
    ):
        """Takes a transformers tokenizer, or makes one of its parts.

        Args:
          hf: a `transformers.PreTrainedTokenizerFast`, which then needs no more than
            `stop_ids` and `chat_encoder`.
          core: a `tokenizers.Tokenizer`, which is copied.
          stop_ids: ids that end a text.
          special_tokens: text of `bos_token`, `eos_token`, ... as far as there are any.
          chat_template: Jinja source, or sources by name ("default", "tool_use", ...).
          chat_encoder: what makes prompts where there is no chat template.
        """
        if hf is None:
            if isinstance(chat_template, Mapping):
                named = dict(chat_template)
                chat_template = named["default"] if [*named] == ["default"] else named
            with quiet_transformers() as transformers:
                hf = transformers.PreTrainedTokenizerFast(
                    tokenizer_object=core,
                    chat_template=chat_template,
                    **(special_tokens or {}),
                )
        self.hf = hf
        self.stop_ids = tuple(stop_ids)
        self.chat_encoder = chat_encoder
        # A tokenizer.json may carry its training run's cutting and padding.
        self.core.no_truncation()
        self.core.no_padding()

    def with_stop_ids(self, stop_ids: Iterable[int]) -> "Tokenizer":
        """The same tokenizer, ending texts at these ids."""
        return Tokenizer(self.hf, stop_ids=stop_ids, chat_encoder=self.chat_encoder)

    @property
    def core(self) -> Core:
        """The `tokenizers` object."""
        return self.hf.backend_tokenizer

    @property
    def special_tokens(self) -> dict[str, str]:
        """Text of `bos_token`, `eos_token`, ... as far as there are any."""
        return self.hf.special_tokens_map

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """Jinja source, sources by name, or None if the checkpoint has none."""
        return self.hf.chat_template

    @cached_property
    def reserved(self) -> frozenset[str]:
        """Names that cannot be variables of a template: arguments have them.

        Whoever passes on variables of strangers has to refuse them: `chat_template` is
        among them.
        """
        found = {"self", "conversations"}  # The latter is transformers' inside.
        for function in (self.chat, self.hf.apply_chat_template):
            for each in inspect.signature(function).parameters.values():
                if each.kind is not each.VAR_KEYWORD:
                    found.add(each.name)
        return frozenset(found)

    @cached_property
    def cleans_up(self) -> bool:
        """Whether decoding takes out spaces before punctuation, as BPE seldom does."""
        insists = (
            "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
        )
        obeys = type(self.core.model).__name__ != "BPE" or getattr(self.hf, insists)
        return bool(self.hf.clean_up_tokenization_spaces and obeys)

    @property
    def base_size(self) -> int:
        """Number of tokens of the vocabulary itself, without those added later."""
        return self.hf.vocab_size

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, those of added tokens among them."""
        return max(self.core.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a plain text, after a beginning-of-text token if the model has one.

        Args:
          text: to encode.
          add_special_tokens: False leaves that token out.

        Raises:
          ValueError: the text holds half of a surrogate pair, which JSON can.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text is no Unicode: {text[error.start]!r} at {error.start}, "
                f"after {text[max(error.start - 20, 0) : error.start]!r}, is half of a "
                "surrogate pair"
            ) from error
        return self.hf.encode(
            text, add_special_tokens=add_special_tokens, verbose=False
        )

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of ids; control tokens are left out unless `skip_special` is False."""
        return self.hf.decode(
            [operator.index(i) for i in ids],
            skip_special_tokens=skip_special,
            clean_up_tokenization_spaces=self.cleans_up,
        )

    def chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        tools: Sequence[Mapping[str, Any] | Callable] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Ids of a conversation, ready for the assistant to continue.

        A value of None in a message counts as absent: an answer that is nothing but
        `tool_calls` often has the content None.

        Args:
          messages: objects with `role` and `content`, oldest first; at least one.
          add_generation_prompt: whether to open the assistant's turn at the end; by
            default where the final message is not continued.
          continue_final_message: leaves the final message open, to be continued; a text
            names the field to continue, e.g. "reasoning_content".
          tools: JSON schemas, or functions with type hints and docstrings; with tools,
            a template named "tool_use" is preferred.
          documents: objects with `title` and `text`, for templates that retrieve.
          **variables: more variables of the template, e.g. `enable_thinking=False`;
            none has a `reserved` name.

        Raises:
          CheckpointError: no chat template, or one that fails on these messages.
          ValueError: as for `encode`.
        """
        if self.chat_template is None and self.chat_encoder is None:
            raise CheckpointError(
                "this checkpoint has no chat template; encode a plain prompt instead"
            )
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or "role" not in message:
                raise CheckpointError(
                    f"chat message {index} is {message!r}, expected an object with "
                    "'role' and 'content'"
                )
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        if documents is not None:
            variables["documents"] = documents
        try:
            text = self._prompt(
                list(messages),
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **variables,
            )
        except Exception as error:  # A template can fail in any way.
            given = f" with {', '.join(sorted(variables))}" if variables else ""
            raise CheckpointError(
                f"the chat template fails on these {len(messages)} messages{given}: "
                f"{error}"
            ) from error
        # The template writes its own beginning-of-text token.
        return self.encode(text, add_special_tokens=False)

    def _prompt(
        self,
        messages: list[Message],
        *,
        tools: Sequence[Mapping[str, Any] | Callable] | None,
        **options: Any,
    ) -> str:
        """A conversation as text."""
        if self.chat_template is not None or self.chat_encoder is None:
            return self.hf.apply_chat_template(
                messages, tools=tools, tokenize=False, **options
            )
        if not messages:
            raise ValueError("there is none; give at least one message")
        with quiet_transformers() as transformers:
            schema = transformers.utils.get_json_schema
        schemas = [
            each if isinstance(each, Mapping) else schema(each) for each in tools or ()
        ]
        return self.chat_encoder(messages, tools=schemas, **options)

    def stream(self) -> TextStream:
        """A fresh decoder for ids that arrive piece by piece."""
        return TextStream(self)
