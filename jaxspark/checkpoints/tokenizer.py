"""Text <-> token ids, chat prompts, and text that appears while ids arrive.

The tokenization itself is the `tokenizers` library's. Special tokens are recognised
inside text, as in transformers, which is what lets a rendered chat template become
control tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Core

from jaxspark.checkpoints.chat_template import Message, render_chat
from jaxspark.checkpoints.errors import CheckpointError
from jaxspark.checkpoints.fields import Fields, read_json, write_json

_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A checkpoint's tokenizer.

    Attributes:
      core: the `tokenizers` object.
      stop_ids: ids that end a text, in the checkpoint's order.
      special_tokens: text of `bos_token`, `eos_token`, ... as far as there are any.
      chat_template: Jinja source, None if the checkpoint has none.
    """

    core: Core
    stop_ids: tuple[int, ...] = ()
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None

    def __post_init__(self):
        # A tokenizer.json may carry its training run's cutting and padding.
        self.core.no_truncation()
        self.core.no_padding()

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.core.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of a plain text, after a beginning-of-text token if the model has one."""
        return self.core.encode(text).ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of ids; control tokens are left out unless `skip_special` is False."""
        return self.core.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Ids of a conversation, ready for the assistant to continue.

        Args:
          messages: objects with `role` and `content`, oldest first.
          add_generation_prompt: whether to open the assistant's turn at the end.
          **variables: more variables of the template, e.g. `enable_thinking=False`.

        Raises:
          CheckpointError: no chat template, or one that fails on these messages.
        """
        if self.chat_template is None:
            raise CheckpointError(
                "this checkpoint has no chat template; encode a plain prompt instead"
            )
        text = render_chat(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            variables={**self.special_tokens, **variables},
        )
        # The template writes its own beginning-of-text token.
        return self.core.encode(text, add_special_tokens=False).ids

    def stream(self) -> "TextStream":
        """A fresh decoder for ids that arrive piece by piece."""
        return TextStream(self)


class TextStream:
    """Turns arriving ids into text, never printing half a character.

    A character's UTF-8 bytes may be spread over tokens; its text is held back until it
    is whole. The pieces joined, `flush()` last, are `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._printed = 0

    def push(self, ids: Iterable[int]) -> str:
        """The text that became certain with these new ids."""
        ids = [int(i) for i in ids]
        if not ids:
            return ""
        self._window += ids
        text = self._tokenizer.decode(self._window)
        certain = text.rstrip(_INCOMPLETE)
        piece = certain[self._printed :]
        self._printed = max(self._printed, len(certain))
        if certain == text:
            # Only the newest ids are kept, as context for decoders that treat the
            # first token of a text differently: the work does not grow with the text.
            self._window = ids
            self._printed = len(self._tokenizer.decode(ids))
        return piece

    def flush(self) -> str:
        """What was held back, at the end of the ids."""
        piece = self._tokenizer.decode(self._window)[self._printed :]
        self._window, self._printed = [], 0
        return piece


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder, None if it has no `tokenizer.json`.

    Raises:
      CheckpointError: a file is damaged, or names a token that does not exist.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    try:
        core = Core.from_str(path.read_bytes().decode("utf-8"))
    except Exception as error:  # The library raises plain Exception.
        raise CheckpointError(f"{path}: is not a tokenizer ({error})") from error
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.exists() else {}
    special = _special_tokens(config)
    stop_ids: tuple[int, ...] = ()
    if "eos_token" in special:
        stop = core.token_to_id(special["eos_token"])
        if stop is None:
            raise CheckpointError(
                f"{config_path}: eos_token is {special['eos_token']!r}, expected a "
                "token of tokenizer.json"
            )
        stop_ids = (stop,)
    return Tokenizer(
        core=core,
        stop_ids=stop_ids,
        special_tokens=special,
        chat_template=_chat_template(folder, Fields(config, str(config_path))),
    )


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Tokens are written as text or as an object with `content`."""
    values = {role: config.get(role) for role in _ROLES}
    texts = {
        role: value.get("content") if isinstance(value, dict) else value
        for role, value in values.items()
    }
    return {role: text for role, text in texts.items() if isinstance(text, str)}


def _chat_template(folder: Path, config: Fields) -> str | None:
    """Its own file, else the configuration's (a text, or a list of named ones)."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from error
    template = config.values.get("chat_template")
    if isinstance(template, list):
        named = {
            entry.get("name"): entry.get("template")
            for entry in template
            if isinstance(entry, dict)
        }
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise config.wrong("chat_template", "Jinja source")
    return template


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`."""
    tokenizer.core.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **tokenizer.special_tokens,
    }
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    write_json(folder / "tokenizer_config.json", config)
