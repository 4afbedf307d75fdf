"""The demo: a real chat model answers with and without speculation, same tokens.

  jaxspark demo
  jaxspark demo --drafts=ngram,hybrid:runs/dspark/drafter@4

For one math, one code and one chat prompt it decodes plainly and with every drafter in
turn (one sequence, greedy), and shows the text, all speeds, accepted lengths
and whether the tokens are identical.
"""

from dataclasses import dataclass

from rich.table import Table

from jaxspark.benchmark.contestants import Contestant, compare
from jaxspark.configuration import option
from jaxspark.launch import common, program

PROMPTS = {
    "math": "A baker makes 12 trays of 8 rolls. She sells 70 rolls in the morning and "
    "half of the rest in the afternoon. How many rolls are left? Think step by step.",
    "code": "Write a Python function that returns the n-th Fibonacci number, then "
    "rewrite it with memoization and show how to call both.",
    "chat": "Give me five short tips for a first visit to Rome, then repeat the list "
    "with one more detail for each tip.",
}


@dataclass(frozen=True, kw_only=True)
class Config(common.TargetOptions):
    """Who takes part, and how long."""

    drafts: tuple[str, ...] = option(
        "Drafters, named as for jaxspark generate; @G sets the drafts per round.",
        ("ngram@3", "dspark@3", "hybrid:dspark@3"),
    )
    max_new_tokens: int = option("Output budget per prompt.", 160, at_least=8)
    repeats: int = option("Timed runs of each kind per prompt.", 2, at_least=1)


def main(config: Config) -> int:
    """Runs the three prompts; exit status 1 if any token differs."""
    console = common.console()
    with console.status(f"loading {config.target}"):
        target, tokenizer = config.load()
        contestants = [Contestant("plain")]
        contestants += [Contestant.of(draft, target) for draft in config.drafts]
    table = Table(title=f"{target.name} · one sequence · greedy, {config.dtype}")
    table.add_column("prompt")
    table.add_column("drafts", min_width=max(len(each.name) for each in contestants))
    for column in ("tokens/s", "speed-up", "accepted length", "identical"):
        table.add_column(column, justify="right")
    identical = True
    for name, text in PROMPTS.items():
        prompt = tokenizer.chat([{"role": "user", "content": text}])
        with console.status(f"{name}: decoding {len(contestants)} ways in turn"):
            completions, seconds = compare(
                target, prompt, contestants, config.max_new_tokens, config.repeats
            )
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
    program.run(main, Config)
