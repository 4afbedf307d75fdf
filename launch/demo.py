"""The demo: a real chat model answers with and without speculation, same tokens.

  python -m launch.demo

For one math, one code and one chat prompt it decodes plainly and speculatively in turn
(one sequence, greedy, float32), and shows the text, both speeds, the accepted length
and whether the tokens are identical.
"""

import time

from absl import flags
from rich.console import Console
from rich.table import Table

from jaxspark import generate, load_drafter
from launch import common

common.define_model_flags()
flags.DEFINE_integer("max_new_tokens", 160, "Output budget per prompt.", lower_bound=8)
flags.DEFINE_integer("repeats", 2, "Timed runs of each kind per prompt.", lower_bound=1)
FLAGS = flags.FLAGS

DEMO_BLOCK_LENGTH = 3
PROMPTS = {
    "math": "A baker makes 12 trays of 8 rolls. She sells 70 rolls in the morning and "
    "half of the rest in the afternoon. How many rolls are left? Think step by step.",
    "code": "Write a Python function that returns the n-th Fibonacci number, then "
    "rewrite it with memoization and show how to call both.",
    "chat": "Give me five short tips for a first visit to Rome, then repeat the list "
    "with one more detail for each tip.",
}


def timed(target, prompt, drafter, block_length):
    """One completion and its seconds."""
    begin = time.perf_counter()
    [completion] = generate(
        target,
        [prompt],
        drafter,
        max_new_tokens=FLAGS.max_new_tokens,
        block_length=block_length,
    )
    return completion, time.perf_counter() - begin


def compare(target, prompt, drafter, block_length):
    """Plain and speculative runs in turn; returns both outputs and best speeds."""
    plain, _ = timed(target, prompt, None, None)  # compiles
    speculative, _ = timed(target, prompt, drafter, block_length)
    seconds = {"plain": [], "speculative": []}
    for _ in range(FLAGS.repeats):
        seconds["plain"].append(timed(target, prompt, None, None)[1])
        run = timed(target, prompt, drafter, block_length)
        seconds["speculative"].append(run[1])
    speeds = {kind: len(plain.tokens) / min(runs) for kind, runs in seconds.items()}
    return plain, speculative, speeds


def main() -> int:
    """Runs the three prompts; exit status 1 if any token differs."""
    console = Console()
    with console.status(f"loading {FLAGS.target}"):
        target = common.load_text_target()
        drafter = load_drafter(FLAGS.draft, target)
    block_length = FLAGS.block_length or min(DEMO_BLOCK_LENGTH, drafter.block_length)
    table = Table(title=f"{target.name} · draft {FLAGS.draft} · block {block_length}")
    for column in ("prompt", "plain tok/s", "speculative tok/s", "speed-up"):
        table.add_column(column, justify="right")
    table.add_column("accepted length", justify="right")
    table.add_column("tokens identical", justify="center")
    identical = True
    for name, text in PROMPTS.items():
        prompt = target.tokenizer.chat([{"role": "user", "content": text}])
        with console.status(f"{name}: decoding plainly and speculatively in turn"):
            plain, fast, speeds = compare(target, prompt, drafter, block_length)
        same = plain.tokens == fast.tokens
        identical &= same
        console.rule(f"{name}: {text}", align="left", style="dim")
        console.print(fast.text, markup=False, highlight=False)
        table.add_row(
            name,
            f"{speeds['plain']:.1f}",
            f"{speeds['speculative']:.1f}",
            f"{speeds['speculative'] / speeds['plain']:.2f}x",
            f"{fast.accepted_length:.2f}",
            f"yes ({len(plain.tokens)})" if same else "NO",
        )
    console.print(table)
    return 0 if identical else 1


if __name__ == "__main__":
    common.run(main)
