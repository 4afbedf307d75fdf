"""Ways to decode one prompt, by name, that take turns."""

import time
from dataclasses import dataclass

from jaxspark.checkpoints import load_drafter
from jaxspark.decoding import DecodeOptions
from jaxspark.drafters import Drafter
from jaxspark.generation import Completion, SamplingParams, generate


@dataclass(frozen=True)
class Contestant:
    """A way to decode; without a drafter plainly."""

    name: str
    drafter: Drafter | None = None
    block_length: int | None = None

    @classmethod
    def of(cls, draft: str, target) -> "Contestant":
        """What a value of --drafts means.

        Raises:
          ValueError: what follows @ is no number of drafts.
        """
        name, at, block = draft.rpartition("@")
        if not at:
            return cls(draft, load_drafter(draft, target))
        if not block.isdecimal() or int(block) < 1:
            raise ValueError(f"--drafts={draft}: {block!r} is not a number of drafts")
        return cls(draft, load_drafter(name, target), int(block))

    def decode(
        self, target, prompt: list[int], max_new_tokens: int
    ) -> tuple[Completion, float]:
        """One completion and its seconds."""
        begin = time.perf_counter()
        [completion] = generate(
            target,
            [prompt],
            self.drafter,
            SamplingParams(max_new_tokens=max_new_tokens),
            options=DecodeOptions(block_length=self.block_length),
        )
        return completion, time.perf_counter() - begin


def compare(
    target,
    prompt: list[int],
    contestants: list[Contestant],
    max_new_tokens: int,
    repeats: int,
) -> tuple[list[Completion], list[float]]:
    """Each one's completion and its best seconds, of runs in turn."""
    # The first ones compile.
    runs = [
        [each.decode(target, prompt, max_new_tokens) for each in contestants]
        for _ in range(1 + repeats)
    ]
    completions = [completion for completion, _ in runs[0]]
    seconds = zip(*([spent for _, spent in run] for run in runs[1:]))
    return completions, list(map(min, seconds))
