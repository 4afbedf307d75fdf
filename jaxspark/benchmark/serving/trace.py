"""Lengths of prompts and answers as people send them.

Quantiles of the conversations in Microsoft's "Azure LLM inference trace 2023", 19,366
requests to one service on a day in November (Patel et al. 2024, "Splitwise: Efficient
Generative LLM Inference Using Phase Splitting"; CC-BY 4.0). Both lengths are drawn by
themselves: in the trace their rank correlation is 0.07.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

_SHARES = (0, 0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95,
           0.99, 1)  # fmt: skip
_PROMPT = (2, 181, 207, 387, 396, 403, 703, 1020, 1071, 1130, 1189, 1315, 2734, 4083,
           4142, 14050)  # fmt: skip
_OUTPUT = (7, 41, 54, 77, 85, 91, 103, 129, 177, 384, 395, 400, 424, 451, 601,
           1000)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of one request.

    Attributes:
      prompt: its conversation's.
      output: its answer's.
    """

    prompt: int
    output: int


def drawn_lengths(
    count: int, *, scale: float, context: int, random: np.random.Generator
) -> list[Lengths]:
    """Lengths of requests, each of which fits into a context.

    Args:
      count: of requests.
      scale: factor of all lengths; machines without accelerators want less than 1.
      context: most tokens of a prompt and its output. What is longer loses in
        proportion, so that long prompts stay long prompts.
      random: draws them.
    """

    def drawn(quantiles: Sequence[int]) -> np.ndarray:
        return np.interp(random.random(count), _SHARES, quantiles) * scale

    return [
        _fitting(prompt, output, context)
        for prompt, output in zip(drawn(_PROMPT), drawn(_OUTPUT))
    ]


def _fitting(prompt: float, output: float, context: int) -> Lengths:
    shrink = min(1.0, context / (prompt + output))
    output_tokens = max(round(output * shrink), 2)
    prompt_tokens = max(round(prompt * shrink), 1)
    return Lengths(
        prompt=min(prompt_tokens, context - output_tokens), output=output_tokens
    )


class Prose:
    """Messages of any length, in which nothing comes again soon.

    Prompts that repeat themselves would make a lookup of drafts look better than it is.
    """

    def __init__(self, tokenizer, texts: Iterable[str], random: np.random.Generator):
        self._tokenizer, self._random = tokenizer, random
        self._texts = list(texts)
        self._ahead: list[int] = []
        empty = tokenizer.chat([{"role": "user", "content": ""}])
        self._frame = len(empty)

    def message(self, tokens: int) -> str:
        """A message that makes a conversation of about so many tokens.

        It is at least a token long, whatever the chat template adds.
        """
        wanted = max(tokens - self._frame, 1)
        while len(self._ahead) < wanted:
            text = self._texts[self._random.integers(len(self._texts))]
            self._ahead += self._tokenizer.encode(text + "\n\n")
        taken, self._ahead = self._ahead[:wanted], self._ahead[wanted:]
        return self._tokenizer.decode(taken)
