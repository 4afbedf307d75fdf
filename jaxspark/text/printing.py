"""Text on standard output while it is generated."""

import time
from collections.abc import Collection

from jaxspark.text.stream import TextStream
from jaxspark.text.tokenizer import Tokenizer


class Printer:
    """Prints text as it grows and remembers when."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Collection[int]):
        self.stream, self.stop_ids = TextStream(tokenizer), stop_ids
        self.arrivals: list[tuple[float, int]] = []

    def __call__(self, slot: int, tokens: list[int]) -> None:
        """Prints what the new tokens add."""
        shown = [token for token in tokens if token not in self.stop_ids]
        print(self.stream.push(shown), end="", flush=True)
        self.arrivals.append((time.perf_counter(), len(tokens)))

    def tokens_per_second(self) -> float | None:
        """Decoding speed after the first arrival, which includes compilation."""
        if len(self.arrivals) < 2:
            return None
        elapsed = self.arrivals[-1][0] - self.arrivals[0][0]
        return sum(count for _, count in self.arrivals[1:]) / elapsed
