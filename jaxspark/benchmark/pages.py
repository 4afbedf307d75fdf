"""`jaxspark bench --suite=pages`: what pages cost, and what shared prefixes save."""

import secrets
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxspark.decoding import (
    Admission,
    DecodeOptions,
    DecodeState,
    Sampling,
    admit,
    decode,
)
from jaxspark.decoding.compiling import compiled
from jaxspark.drafters import NgramDrafter
from jaxspark.generation import Request
from jaxspark.models.pages import pages_for
from jaxspark.target import Target
from jaxspark.timing import alternate, medians

SLOTS, CONTEXT, ROUNDS, BLOCK = 8, 1024, 8, 4
# Of a slot's tokens, as shares of the context.
FILLED = {"a quarter": 0.25, "half": 0.5, "nine tenths": 0.9}
# Of caches: rows of slots' own, pages of their own, pages of which two slots share one.
LAYOUTS = "rows", "pages", "shared"
# Tokens that prompts share, and their own.
SHARED, OWN = 1000, 24


def bench_pages(console: Console, target: Target, repeats: int) -> dict:
    """Rounds on all layouts of the caches in turn; cold prompts and hits in turn."""
    rounds = {
        f"{name}, {layout}": _rounds(target, share, layout)
        for name, share in FILLED.items()
        for layout in LAYOUTS
    }
    middle = medians(alternate(rounds, repeats))
    figures: dict[str, float] = {}
    table = Table(title=f"{SLOTS} slots of {CONTEXT} positions · ms of a round")
    for column in ("filled", *LAYOUTS, "pages / rows", "shared / rows"):
        table.add_column(column, justify="right")
    for name in FILLED:
        rows, pages, shared = (middle[f"{name}, {layout}"] for layout in LAYOUTS)
        figures[f"{name} filled, pages / rows"] = pages / rows
        figures[f"{name} filled, shared / rows"] = shared / rows
        shown = (f"{1e3 * each / ROUNDS:.1f}" for each in (rows, pages, shared))
        table.add_row(name, *shown, f"{pages / rows:.3f}", f"{shared / rows:.3f}")
    console.print(table)
    cold, hit = _first_tokens(target, repeats)
    figures |= {"first token cold, s": cold, "first token with a hit, s": hit}
    console.print(
        f"first token of a prompt of {SHARED + OWN} tokens: {cold:.3f} s cold, "
        f"{hit:.3f} s where {SHARED} are shared ({hit / cold:.3f})"
    )
    return figures


def _rounds(target: Target, share: float, layout: str) -> Callable[[], float]:
    """Seconds of some rounds of slots that are so full; rows are anything."""
    paged = layout != "rows"
    drafter = NgramDrafter(block_length=BLOCK)
    options = DecodeOptions(block_length=BLOCK).resolve(drafter, SLOTS)
    room = ROUNDS * (BLOCK + 1)
    per_slot = pages_for(CONTEXT)
    random = np.random.default_rng(0)
    length = int(share * CONTEXT) - room
    prompts = random.integers(0, target.model.config.vocab_size, (SLOTS, length))

    def run() -> float:
        state = DecodeState.empty(
            target.model,
            drafter,
            slots=SLOTS,
            capacity=CONTEXT,
            block_length=BLOCK,
            pages=SLOTS * per_slot + 1 if paged else None,
        )
        admission = Admission.of(
            state,
            prompts.tolist(),
            [length + room] * SLOTS,
            Sampling.of(SLOTS),
            processed=[length - 1] * SLOTS,
        )
        state = admit(state, jnp.arange(SLOTS), admission)
        if paged:
            table = 1 + random.permutation(SLOTS * per_slot).reshape(SLOTS, per_slot)
            if layout == "shared":
                table[:2, 0] = -table[0, 0]
            state = state.with_pages(table)
        jax.block_until_ready(state)
        begin = time.perf_counter()
        state = compiled(decode)(
            target.model, drafter, state, jnp.int32(ROUNDS), options=options
        )
        jax.block_until_ready(state)
        return time.perf_counter() - begin

    return run


def _first_tokens(target: Target, repeats: int) -> Sequence[float]:
    """Median seconds to the first token: cold, and after a prompt that shares most."""
    from jaxspark.serving import Demand, Engine, Prefilled

    random = np.random.default_rng(0)
    vocab = target.model.config.vocab_size
    system = random.integers(0, vocab, SHARED).tolist()

    with Engine(
        target, NgramDrafter(block_length=BLOCK), slots=4, context=2048
    ) as engine:

        def first(salt: Callable[[], str]) -> Callable[[], float]:
            def run() -> float:
                own = random.integers(0, vocab, OWN).tolist()
                request = Request([*system, *own], max_new_tokens=4, stop_ids=())
                demand = Demand(group="", choice=0, request=request, cache_salt=salt())
                begin = time.perf_counter()
                stream = iter(engine.submit(demand))
                event = next(stream)
                seconds = time.perf_counter() - begin
                assert isinstance(event, Prefilled)
                for _ in stream:
                    pass
                return seconds

            return run

        contestants = {
            "cold": first(lambda: secrets.token_hex(8)),
            "hit": first(lambda: "shared"),
        }
        middle = medians(alternate(contestants, repeats))
    return middle["cold"], middle["hit"]
