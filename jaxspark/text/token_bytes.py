"""The bytes that a token stands for, which its text alone cannot always say.

A character may be spread over several tokens, so clients that put log-probabilities
beside text are given bytes (OpenAI's `logprobs.content[].bytes`). Vocabularies write
bytes in two ways: GPT-2's alphabet, in which every byte is a printable character, and
pieces with a mark for the space, beside tokens `<0x00>` to `<0xFF>`.
"""

import re
from functools import cached_property

from tokenizers import Tokenizer as Core

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "▁"


def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 as itself, other bytes from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


class TokenBytes:
    """Bytes of tokens, by id."""

    def __init__(self, core: Core):
        self._core = core
        self._added = {
            i: token.content for i, token in core.get_added_tokens_decoder().items()
        }

    @cached_property
    def _alphabet(self) -> dict[str, int] | None:
        decoder = self._core.decoder
        byte_level = decoder is not None and b"ByteLevel" in decoder.__getstate__()
        return byte_alphabet() if byte_level else None

    def __call__(self, token: int) -> bytes:
        """The token's bytes; none for an id without a token."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._core.id_to_token(token)
        if piece is None:
            return b""
        if self._alphabet is not None:
            return b"".join(
                bytes([self._alphabet[c]]) if c in self._alphabet else c.encode()
                for c in piece
            )
        if byte := _BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace(_SPACE, " ").encode()
