"""`jaxspark bench --suite=draft`: a drafter alone, in hybrid, and prompt lookup."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from rich.console import Console
from rich.table import Table

from jaxspark.benchmark.sequences import TimingOptions, decode_seconds
from jaxspark.checkpoints import load_drafter
from jaxspark.configuration import option
from jaxspark.decoding import DecodeOptions
from jaxspark.drafters import NgramDrafter, PlainDrafter, hybrid
from jaxspark.evaluation.acceptance import macro_average
from jaxspark.timing import alternate


@dataclass(frozen=True, kw_only=True)
class DraftsOptions(TimingOptions):
    """What is drafted."""

    draft_blocks: tuple[int, ...] = option(
        "Block lengths of --suite=draft.", (2, 3, 4, 5, 6, 7), at_least=1
    )


def bench_drafts(
    console: Console,
    target,
    draft: str,
    prompts: Mapping[str, Sequence[Sequence[int]]],
    options: DraftsOptions,
) -> dict:
    """Tokens per second by domain, one sequence, greedy; every drafter and block."""
    model = load_drafter(draft, target)
    counters: dict[str, dict] = {}
    by_domain: dict[str, dict[str, list[float]]] = {}

    def contestant(name, drafter, block):
        decode_options = DecodeOptions(block_length=block).resolve(drafter, 1)
        counters[name], by_domain[name] = {}, {domain: [] for domain in prompts}

        def run():
            for domain, few in prompts.items():
                runs = [
                    decode_seconds(
                        target.model,
                        drafter,
                        [prompt],
                        new_tokens=options.new_tokens,
                        options=decode_options,
                        capacity=options.capacity,
                    )
                    for prompt in few
                ]
                by_domain[name][domain].append(sum(seconds for seconds, _ in runs))
                rounds = sum(int(s.counters.rounds_B.sum()) for _, s in runs)
                counters[name][domain] = options.new_tokens * len(few) / rounds
            return 0.0

        return run

    contestants = {"plain": contestant("plain", PlainDrafter(), 0)}
    for block in (b for b in options.draft_blocks if b <= model.block_length):
        lookup = NgramDrafter(block_length=block)
        for name, drafter in (
            ("ngram", lookup),
            (draft, model),
            (f"hybrid:{draft}", hybrid(lookup, model)),
        ):
            name = f"{name}, block {block}"
            contestants[name] = contestant(name, drafter, block)
    with console.status("decoding in turn"):
        alternate(contestants, options.repeats)
    table = Table(title=f"{target.name} · one sequence · tokens/s against plain")
    table.add_column("")
    for column in (*prompts, "average", "accepted length"):
        table.add_column(column, justify="right")
    tokens = {domain: options.new_tokens * len(few) for domain, few in prompts.items()}
    # The first run of each compiles and is not counted.
    middle = {
        name: {domain: median(runs[1:]) for domain, runs in each.items()}
        for name, each in by_domain.items()
    }
    figures = {}
    for name, seconds in middle.items():
        ratio = {d: middle["plain"][d] / seconds[d] for d in prompts}
        accepted = macro_average(list(counters[name].values()))
        figures[name] = {
            "tokens_per_second": {d: tokens[d] / seconds[d] for d in prompts},
            "against_plain": ratio | {"average": macro_average(list(ratio.values()))},
            "accepted_length": counters[name] | {"average": accepted},
        }
        shown = figures[name]["against_plain"].values()
        table.add_row(name, *(f"{each:.2f}x" for each in shown), f"{accepted:.2f}")
    console.print(table)
    return figures
