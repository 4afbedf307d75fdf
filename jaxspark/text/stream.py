"""Text that appears while ids arrive.

`tokenizers.DecodeStream` decodes a short window of ids and keeps back half a UTF-8
character. Its pieces are what decoding all ids gives, with two exceptions, which are
ours on purpose:

- Byte-fallback tokens: the decoder reads a *run* of them as one piece of UTF-8, and one
  broken byte makes replacement characters of the whole run. The stream has printed the
  run's beginning by then. So a run is handed on when the token behind it is known.
- Cleaning up spaces before punctuation (`clean_up_tokenization_spaces`, which only
  tokenizers other than BPE obey) can reach back over any piece: such a text appears
  whole, at the end.

Skipped control tokens are not handed on either: they have no text, and a run of bytes
goes on behind them.
"""

from collections.abc import Collection, Iterable
from typing import Protocol, runtime_checkable

from tokenizers import Tokenizer as Core
from tokenizers.decoders import DecodeStream


@runtime_checkable
class Decoder(Protocol):
    """What a stream needs of a tokenizer."""

    @property
    def core(self) -> Core:
        """The tokenizer of `tokenizers`."""

    @property
    def cleans_up(self) -> bool:
        """Whether decoding removes spaces before punctuation."""

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ids, without control tokens or with them."""


class TextStream:
    """Turns arriving ids into text, never printing half a character.

    The pieces joined, `flush()` last, are `decode` of all ids. The work per id does not
    grow with the text; only a run of broken characters is decoded again and again.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        *,
        skip_special: bool = True,
        shown: Collection[str] = (),
    ):
        """Begins a text.

        Args:
          tokenizer: whose ids arrive.
          skip_special: whether control tokens are left out.
          shown: those that are not, for parsers that look for them.
        """
        core = tokenizer.core
        self._tokenizer = tokenizer
        self._skipped = {
            i
            for i, token in core.get_added_tokens_decoder().items()
            if skip_special and token.special and token.content not in shown
        }
        self._bytes: set[int | None] = set()
        if core.decoder is not None and b"ByteFallback" in core.decoder.__getstate__():
            self._bytes = {core.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
        self._start()

    def _start(self) -> None:
        self._ids: list[int] = []
        self._held: list[int] = []
        self._printed = 0
        # Those that are left out never reach it.
        self._stream = DecodeStream(skip_special_tokens=False)

    def push(self, ids: Iterable[int]) -> str:
        """The text that became certain with these new ids."""
        text = ""
        for token in map(int, ids):
            if token in self._skipped:
                continue
            self._ids.append(token)
            if self._tokenizer.cleans_up:
                continue
            self._held.append(token)
            if token not in self._bytes:
                text += self._stream.step(self._tokenizer.core, self._held) or ""
                self._held = []
        self._printed += len(text)
        return text

    def flush(self) -> str:
        """What was held back, at the end of the ids; the stream then begins anew."""
        text = self._tokenizer.decode(self._ids, skip_special=False)[self._printed :]
        self._start()
        return text
