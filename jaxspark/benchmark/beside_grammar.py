"""`jaxspark bench --suite=grammar`: what one output under a grammar costs others.

A batch of free outputs and one more, which is free or under a grammar, in turn. Both
times the others are the same tokens, so the time until they have come is comparable:
with the grammar every round waits for the host, which works out masks between its
halves.
"""

import time
from collections.abc import Sequence
from itertools import cycle, islice
from statistics import median

from rich.console import Console

from jaxspark.decoding import DecodeOptions
from jaxspark.drafters import Drafter
from jaxspark.generation import ContinuousBatch, Request
from jaxspark.generation.generate import capacity_for
from jaxspark.grammars import Grammar
from jaxspark.target import Target
from jaxspark.timing import alternate, medians

SLOTS, NEW_TOKENS = 4, 24
# It does not end before the others do.
TABLE = {
    "type": "array",
    "minItems": 200,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "size": {"type": "integer"},
            "kind": {"enum": ["red", "green", "blue"]},
        },
        "required": ["name", "size", "kind"],
        "additionalProperties": False,
    },
}


def bench_beside_grammar(
    console: Console,
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    repeats: int,
) -> dict:
    """Seconds until the others have come, with and without."""
    batch = ContinuousBatch(
        target,
        drafter,
        slots=SLOTS,
        capacity=capacity_for(prompts, 2 * NEW_TOKENS, drafter.block_length),
        options=DecodeOptions(coupling="gumbel"),
        together=SLOTS,
    )
    free = [
        Request(ids, max_new_tokens=NEW_TOKENS, temperature=1.0, seed=i, stop_ids=())
        for i, ids in enumerate(islice(cycle(prompts), SLOTS - 1))
    ]

    def contestant(grammar: Grammar | None):
        stop_ids = None if grammar else ()
        last = Request(
            prompts[0],
            max_new_tokens=2 * NEW_TOKENS,
            temperature=1.0,
            seed=SLOTS,
            stop_ids=stop_ids,
            grammar=grammar,
        )

        def run() -> float:
            others = {batch.submit(request) for request in free}
            index = batch.submit(last)
            batch.step(rounds=1)  # Prompts are read.
            begin = time.perf_counter()
            while others:
                others -= {each.index for each in batch.step() if each.completion}
            seconds = time.perf_counter() - begin
            batch.cancel(index)
            while not batch.idle:
                batch.step()
            return seconds

        return run

    grammar = Grammar(kind="json_schema", value=TABLE)
    with console.status(f"{SLOTS} slots, one of them under a grammar or not"):
        runs = alternate(
            {"free": contestant(None), "grammar": contestant(grammar)}, repeats
        )
    slower = median(b / a for a, b in zip(runs["free"], runs["grammar"])) - 1
    seconds = medians(runs)
    tokens = (SLOTS - 1) * (NEW_TOKENS - 1)
    console.print(
        f"{SLOTS - 1} others take {seconds['free']:.2f} s beside a free output, "
        f"{seconds['grammar']:.2f} s beside one under a grammar: "
        f"{100 * slower:+.1f} % (median of {repeats} pairs)"
    )
    return {
        "slots": SLOTS,
        "others_tokens": tokens,
        "seconds": seconds,
        "slower": slower,
        "runs": runs,
    }
