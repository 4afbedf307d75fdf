"""`jaxspark bench --suite=decode`: one sequence, and one pass over some rows."""

import os
import tempfile
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from jaxspark.benchmark.peer import Peer
from jaxspark.benchmark.sequences import TimingOptions, decode_seconds
from jaxspark.checkpoints import save_target
from jaxspark.configuration import option
from jaxspark.decoding import DecodeOptions
from jaxspark.drafters import NgramDrafter, PlainDrafter
from jaxspark.models import FlatTokens
from jaxspark.parallel import vocabulary
from jaxspark.timing import alternate, medians

PROMPTS = (
    "A train leaves at 9 with 120 people. At each of 4 stops 15 leave and 8 join. How "
    "many arrive? Show every step.",
    "Write a Python class for a stack with push, pop and peek, then its unit tests.",
    "Write a short dialogue between a baker and a customer who cannot decide.",
)


@dataclass(frozen=True, kw_only=True)
class SequenceOptions(TimingOptions):
    """What is decoded beside plain decoding."""

    peer_python: str | None = option(
        "A Python with torch and transformers, to compare with.", None
    )
    rows: tuple[int, ...] = option(
        "Rows per round to time.", (1, 2, 4, 8, 16, 32), at_least=1
    )
    ngram_blocks: tuple[int, ...] = option(
        "Block lengths timed.", (2, 3, 4, 6, 8), at_least=1
    )


def bench_decode(console: Console, target, options: SequenceOptions) -> dict:
    """Tokens per second of one sequence: peer, plain, n-gram at each block length."""
    prompts = [
        target.tokenizer.chat([{"role": "user", "content": text}]) for text in PROMPTS
    ]
    states = {}

    def ours(name, drafter, decode_options):
        def run():
            seconds = 0.0
            states[name] = []
            for prompt in prompts:
                spent, state = decode_seconds(
                    target.model,
                    drafter,
                    [prompt],
                    new_tokens=options.new_tokens,
                    options=decode_options,
                    capacity=options.capacity,
                )
                seconds += spent
                states[name].append(jax.device_get(state.counters))
            return seconds

        return run

    plain_only = DecodeOptions(block_length=0)
    contestants = {"plain": ours("plain", PlainDrafter(), plain_only)}
    for block in options.ngram_blocks:
        name, lookup = f"ngram, block {block}", NgramDrafter(block_length=block)
        drafted = DecodeOptions(block_length=block).resolve(lookup, 1)
        contestants[name] = ours(name, lookup, drafted)
    with tempfile.TemporaryDirectory() as folder:
        if options.peer_python:
            checkpoint = os.path.join(folder, "target")
            save_target(checkpoint, target)
            peer = Peer(options.peer_python, checkpoint)
            contestants[f"transformers {peer.version}"] = lambda: sum(
                peer.decode(prompt, options.new_tokens)["seconds"] for prompt in prompts
            )
        with console.status("decoding in turn"):
            seconds = alternate(contestants, options.repeats)
    tokens = options.new_tokens * len(prompts)
    plain = medians(seconds)["plain"]
    table = Table(
        title=f"{target.name} · one sequence · {jnp.dtype(target.model.dtype).name}"
    )
    for column in ("", "tokens/s", "against plain", "accepted length"):
        table.add_column(column, justify="right")
    figures = {}
    for name, middle in medians(seconds).items():
        rounds = sum(int(c.rounds_B.sum()) for c in states.get(name, ()))
        accepted = tokens / rounds if rounds else 1.0
        figures[name] = {
            "tokens_per_second": tokens / middle,
            "against_plain": plain / middle,
            "accepted_length": accepted,
            "seconds": seconds[name],
        }
        table.add_row(
            name, f"{tokens / middle:.1f}", f"{plain / middle:.2f}x", f"{accepted:.2f}"
        )
    console.print(table)
    return {"tokens": figures, "rows": _bench_rows(console, target.model, options)}


def _bench_rows(console: Console, model, options: SequenceOptions) -> dict:
    """Seconds of one target pass over 1, 2, 4, ... rows of one slot."""
    cache = model.init_cache(1, options.capacity)

    @jax.jit
    def passes(model, cache, ids_1Q, count):
        """`count` passes in one program, each fed the last one's choices."""
        counts_1 = jnp.array([ids_1Q.shape[1]])

        def body(i, carry):
            ids_1Q, cache = carry
            tokens = FlatTokens.from_rows(ids_1Q, jnp.array([64]) + i, counts_1)
            x_TD, _, cache = model(tokens, cache)
            return vocabulary.argmax(model.logits(x_TD))[None], cache

        return jax.lax.fori_loop(0, count, body, (ids_1Q, cache))[0]

    def contestant(rows):
        ids_1Q = jnp.ones((1, rows), jnp.int32)

        def run():
            begin = time.perf_counter()
            jax.block_until_ready(passes(model, cache, ids_1Q, 8))
            return (time.perf_counter() - begin) / 8

        return run

    rows = options.rows
    with console.status("timing rows per round"):
        seconds = alternate({str(r): contestant(r) for r in rows}, options.repeats)
    table = Table(title=f"seconds per round · cache of {options.capacity} positions")
    for column in ("rows", "ms", "against one row"):
        table.add_column(column, justify="right")
    middle = medians(seconds)
    for r in map(str, rows):
        ratio = middle[r] / middle[str(rows[0])]
        table.add_row(r, f"{1e3 * middle[r]:.1f}", f"{ratio:.2f}x")
    console.print(table)
    return middle
