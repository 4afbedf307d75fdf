"""One output under a grammar: which tokens may come next, now and along drafts.

Masks are bits, 32 tokens in a word, the first token's the lowest. A row's mask is a
function of the tokens before it alone, so speculation cannot be seen in it.
"""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt

if TYPE_CHECKING:
    from llguidance import LLMatcher

_BITS = 32
ALL = np.uint32(2**_BITS - 1)


class GrammarError(ValueError):
    """A grammar that is none, or that an output cannot go on with."""


class Matcher:
    """The state of a grammar behind the tokens of one output.

    Attributes:
      taken: tokens that it has seen.
    """

    def __init__(
        self,
        parser: "LLMatcher",
        *,
        vocab: int,
        stop_ids: Collection[int],
        ends: Collection[int],
    ):
        """Takes a parser over.

        Args:
          parser: at the beginning of the output.
          vocab: tokens that there are.
          stop_ids: those that end the output, allowed where it is complete. One that
            is text may come as text too, and cuts the output, as a stop string does.
          ends: those that the parser ends a text with.
        """
        self.taken = 0
        self._parser, self._vocab = parser, vocab
        self._stop_ids, self._ends = frozenset(stop_ids), frozenset(ends)
        self._next: np.ndarray | None = None
        # Tokens from here behind which the grammar cannot go on, and why.
        self._dead_end: tuple[list[int], GrammarError] | None = None

    def fork(self) -> "Matcher":
        """Another output that has come as far."""
        other = Matcher(
            self._parser.deep_copy(),
            vocab=self._vocab,
            stop_ids=self._stop_ids,
            ends=self._ends,
        )
        other.taken = self.taken
        return other

    @property
    def finished(self) -> bool:
        """Whether the output is complete, and only a stop token may follow."""
        return self._parser.is_stopped() and not self._parser.is_error()

    def advance(self, tokens: Sequence[int]) -> None:
        """Goes on by tokens of the output; a stop token is its last.

        Raises:
          GrammarError: they do not obey, or the parser gives up. Those before have been
            taken.
        """
        dead_end, self._dead_end = self._dead_end, None
        self._next = None if tokens else self._next
        for count, token in enumerate(tokens):
            if dead_end is not None and list(tokens[:count]) == dead_end[0]:
                raise dead_end[1]
            if token not in self._stop_ids and not self._parser.consume_token(token):
                raise GrammarError(
                    f"token {token} does not obey the grammar: "
                    f"{self._parser.get_error()}"
                )
            self.taken += 1
            if token in self._stop_ids:
                return

    def mask(self) -> UInt[np.ndarray, " U"]:
        """Tokens that may come next.

        Raises:
          GrammarError: none may, or the parser gives up.
        """
        if self._next is None:
            self._next = self._compute()
        return self._next

    def masks_along(self, drafts: Sequence[int]) -> UInt[np.ndarray, "Q U"]:
        """Tokens that may come next, and behind each of the drafts.

        Behind a draft that may not come, or that ends the output, all may: nothing is
        ever put out there. So they may where the grammar cannot go on behind a draft,
        which is an error only if the draft is taken and the output goes on.

        Raises:
          GrammarError: see `mask`.
        """
        masks_QU = np.full((len(drafts) + 1, words(self._vocab)), ALL)
        masks_QU[0] = self.mask()
        # What has failed cannot be rolled back, so another walks.
        walker, self._dead_end = self.fork(), None
        for row, draft in enumerate(drafts):
            if draft in self._stop_ids or not allows(masks_QU[row], draft):
                break
            try:
                walker.advance([draft])
                masks_QU[row + 1] = walker.mask()
            except GrammarError as error:
                self._dead_end = list(drafts[: row + 1]), error
                break
        return masks_QU

    def _compute(self) -> np.ndarray:
        parser, size = self._parser, words(self._vocab)
        mask_U = np.zeros((size,), np.uint32)
        bits = np.frombuffer(parser.compute_bitmask(), "<u4")
        if parser.is_error():
            raise GrammarError(f"the grammar gave up: {parser.get_error()}")
        mask_U[:] = bits[:size]
        for token in self._ends:
            mask_U[token // _BITS] &= ~np.uint32(1 << token % _BITS)
        if parser.is_accepting():
            for token in self._stop_ids:
                mask_U[token // _BITS] |= np.uint32(1 << token % _BITS)
        if not mask_U.any():
            raise GrammarError(
                "no token of this model continues the output as the grammar wants it"
            )
        return mask_U


def words(vocab: int) -> int:
    """Words of a mask, U."""
    return -(-vocab // _BITS)


def allows(mask_U: UInt[np.ndarray, " U"], token: int) -> bool:
    """Whether a token is in a mask."""
    return bool(mask_U[token // _BITS] >> np.uint32(token % _BITS) & 1)


def listed(mask_U: UInt[np.ndarray, " U"]) -> list[int]:
    """The tokens of a mask."""
    bits = np.unpackbits(mask_U.astype("<u4").view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()
