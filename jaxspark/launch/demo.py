"""The demo: a real chat model answers with and without speculation, same tokens.

  jaxspark demo
  jaxspark demo --drafts=ngram,hybrid:runs/dspark/drafter@4

For one math, one code and one chat prompt it decodes plainly and with every drafter in
turn (one sequence, greedy), and shows the text, all speeds, accepted lengths
and whether the tokens are identical.
"""

import time
from dataclasses import dataclass

from absl import flags
from rich.console import Console
from rich.table import Table

from jaxspark import Completion, generate, load_drafter
from jaxspark.drafters import Drafter
from jaxspark.launch import common, program

common.define_model_flags(draft=None)
flags.DEFINE_list(
    "drafts",
    ["ngram@3", "dspark@3", "hybrid:dspark@3"],
    "Drafters, named as for jaxspark generate; @G sets the drafts per round.",
)
flags.DEFINE_integer("max_new_tokens", 160, "Output budget per prompt.", lower_bound=8)
flags.DEFINE_integer("repeats", 2, "Timed runs of each kind per prompt.", lower_bound=1)
FLAGS = flags.FLAGS

PROMPTS = {
    "math": "A baker makes 12 trays of 8 rolls. She sells 70 rolls in the morning and "
    "half of the rest in the afternoon. How many rolls are left? Think step by step.",
    "code": "Write a Python function that returns the n-th Fibonacci number, then "
    "rewrite it with memoization and show how to call both.",
    "chat": "Give me five short tips for a first visit to Rome, then repeat the list "
    "with one more detail for each tip.",
}


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

    def decode(self, target, prompt: list[int]) -> tuple[Completion, float]:
        """One completion and its seconds."""
        begin = time.perf_counter()
        [completion] = generate(
            target,
            [prompt],
            self.drafter,
            max_new_tokens=FLAGS.max_new_tokens,
            block_length=self.block_length,
        )
        return completion, time.perf_counter() - begin


def compare(target, prompt: list[int], contestants: list[Contestant]):
    """Each one's completion and its best seconds, of runs in turn."""
    # The first ones compile.
    completions = [each.decode(target, prompt)[0] for each in contestants]
    rounds = [
        [each.decode(target, prompt)[1] for each in contestants]
        for _ in range(FLAGS.repeats)
    ]
    return completions, [min(runs) for runs in zip(*rounds)]


def main() -> int:
    """Runs the three prompts; exit status 1 if any token differs."""
    console = Console()
    with console.status(f"loading {FLAGS.target}"):
        target = common.load_text_target()
        contestants = [Contestant("plain")]
        contestants += [Contestant.of(draft, target) for draft in FLAGS.drafts]
    table = Table(title=f"{target.name} · one sequence · greedy, {FLAGS.dtype}")
    table.add_column("prompt")
    table.add_column("drafts", min_width=max(len(each.name) for each in contestants))
    for column in ("tokens/s", "speed-up", "accepted length", "identical"):
        table.add_column(column, justify="right")
    identical = True
    for name, text in PROMPTS.items():
        prompt = target.tokenizer.chat([{"role": "user", "content": text}])
        with console.status(f"{name}: decoding {len(contestants)} ways in turn"):
            completions, seconds = compare(target, prompt, contestants)
        plain = completions[0]
        console.rule(f"{name}: {text}", align="left", style="dim")
        console.print(completions[-1].text, markup=False, highlight=False)
        for each, completion, spent in zip(contestants, completions, seconds):
            same = completion.tokens == plain.tokens
            identical &= same
            table.add_row(
                name if each is contestants[0] else "",
                each.name,
                f"{len(completion.tokens) / spent:.1f}",
                f"{seconds[0] / spent:.2f}x",
                f"{completion.accepted_length:.2f}",
                f"yes ({len(plain.tokens)})" if same else "NO",
            )
        table.add_section()
    console.print(table)
    return 0 if identical else 1


if __name__ == "__main__":
    program.run(main)
