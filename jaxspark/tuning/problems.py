"""What kernels are tuned for: an op, operands of a model's size, sizes worth trying.

A part of what a model has, experts or slots or vocabulary, on which sizes do not
depend, so that a schedule is made in seconds. Operands are made by JAX, of any values
that the op can have; of their shapes alone where nothing is run.

A static schedule knows no values. What a kernel reads to know how often its loops turn
is therefore a function of its own (`chunks_of`), in whose place a problem has numbers.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import (
    Entries,
    Index,
    Ragged,
    Rotary,
    Rows,
    Table,
    cached_attention,
    draft_sampling,
    grouped_matmul,
    indexer_topk,
    sparse_attention,
    verify,
)
from pallas_kernels.block_sizes import Sizes, Trial, trying
from pallas_kernels.cached_attention import mosaic_tpu_kernel as attention
from pallas_kernels.grouped_matmul import mosaic_tpu as grouped
from pallas_kernels.grouped_matmul.visits import Visits
from pallas_kernels.indexer_topk import mosaic_tpu as indexer
from pallas_kernels.ragged import split_lanes
from pallas_kernels.sparse_attention import mosaic_tpu_kernel as sparse
from pallas_kernels.transposed import Transposed

BF16 = jnp.bfloat16


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing to tune.

    Attributes:
      name: the op and what it is of.
      tried: sizes to try, by name.
      operands: makes them.
      run: the op, of these; takes `implementation`.
      known: what the kernel reads to know its turns, and instead what of its sizes and
        of what it was called with.
    """

    name: str
    tried: Mapping[str, tuple[int, ...]]
    operands: Callable[[], tuple]
    run: Callable[..., Any]
    known: tuple[tuple[Any, str, Callable[..., Any]], ...] = ()

    @property
    def op(self) -> str:
        """Whose sizes they are."""
        return self.name.partition(" ")[0]

    def candidates(self) -> list[Sizes]:
        """All combinations of what is tried."""
        values = itertools.product(*self.tried.values())
        return [dict(zip(self.tried, each)) for each in values]

    def asked(self) -> tuple[str, Sizes]:
        """The coarse shape by which the kernel asks for its sizes, and their defaults.

        Raises:
          ValueError: the kernel cannot take the operands.
        """
        run = functools.partial(self.run, implementation="mosaic_tpu")
        with trying() as trial:
            jax.eval_shape(run, *jax.eval_shape(self.operands))
        [(of, sizes)] = [
            (of, sizes) for (op, of), sizes in trial.asked.items() if op == self.op
        ]
        return of, {name: sizes[name] for name in self.tried}

    @contextlib.contextmanager
    def with_known_turns(self, trial: Trial) -> Iterator[None]:
        """Within it loops turn as often as they would for the operands."""
        before = [vars(owner)[name] for owner, name, _ in self.known]

        def sizes():
            """What the kernel asked for; nothing before it does."""
            asked = trial.asked.items()
            return next((sizes for (op, _), sizes in asked if op == self.op), {})

        def instead(of):
            return lambda *arguments: of(sizes(), *arguments)

        try:
            for owner, name, of in self.known:
                setattr(owner, name, instead(of))
            yield
        finally:
            for (owner, name, _), value in zip(self.known, before):
                setattr(owner, name, value)


def _normal(*shape: int, dtype=BF16):
    return jax.random.normal(jax.random.key(len(shape)), shape, dtype)


def _ragged(slots: int, rows: int, start: int) -> Ragged:
    """Every slot has so many tokens, from a position on."""
    return Ragged(
        slots_T=jnp.repeat(jnp.arange(slots), rows),
        starts_B=jnp.full(slots, start),
        offsets_B=jnp.arange(slots) * rows,
        counts_B=jnp.full(slots, rows),
        rows=rows,
    )


def _verification(name: str, width: int, rows: int, tokens: int) -> Problem:
    def operands():
        keys_R2 = jnp.arange(2 * rows).reshape(rows, 2)
        return (
            _normal(rows, width),
            _normal(tokens, width),
            Rows(jnp.ones(rows), keys_R2),
        )

    # Fewer rows are a step of their own.
    tried = {"rows" if rows > 512 else "tokens": (256, 512, 1024)}
    return Problem(name=f"verify {name}", tried=tried, operands=operands, run=verify)


def _drafts(name: str, slots: int, tokens: int, rank: int = 256) -> Problem:
    def operands():
        keys_R2 = jnp.arange(2 * slots).reshape(slots, 2)
        return (
            _normal(2, slots, tokens, dtype=jnp.float32),
            jnp.int32(0),
            _normal(slots, rank),
            _normal(tokens, rank),
            Rows(jnp.ones(slots), keys_R2),
        )

    return Problem(
        name=f"draft_sampling {name}",
        tried={"tokens": (1024, 2048, 4096)},
        operands=operands,
        run=draft_sampling,
    )


def _experts(
    name: str, kind: str, outputs: int, inputs: int, rows: int, experts: int = 16
) -> Problem:
    """Experts of which all have rows, as when decoding."""

    def operands():
        shape = (2 * experts, outputs, inputs)
        if kind == "bfloat16":
            w_GOI = _normal(*shape)
        else:
            elements = jnp.zeros((shape[0], inputs // 2, outputs), jnp.uint8)
            scales = jnp.full((shape[0], inputs // 32, outputs), 127, jnp.uint8)
            w_GOI = Transposed(elements, scales, jnp.dtype(BF16))
        sizes_E = jnp.full(experts, rows)
        return _normal(experts * rows, inputs), w_GOI, sizes_E, jnp.int32(experts)

    def run(x_AI, w_GOI, sizes_E, offset, **options):
        return grouped_matmul(x_AI, w_GOI, sizes_E, group_offset=offset, **options)

    tiles_of = Visits.of

    def all_hit(sizes, *arguments):
        visits = tiles_of(*arguments)
        return replace(visits, count=experts * max(rows // visits.tile, 1))

    def group_of(sizes, groups_V, visit):
        return visit // max(rows // sizes["rows"], 1)

    tried = {"outputs": (512, 1024, 2048) if kind == "fp4" else (256, 512, 1024)}
    return Problem(
        name=f"grouped_matmul {name} {kind}",
        tried={"rows": (32, 64, 128)} if rows > 32 else tried,
        operands=operands,
        run=run,
        known=(
            (Visits, "of", all_hit),
            (grouped, "group_of", group_of),
        ),
    )


def _attention(name: str, heads: int, rows: int, picks: int, read: int) -> Problem:
    """Of 8 slots, which read so many entries; a query sees `picks` of them, or all."""
    slots, entries, width, window, turning = 8, 4096, 512, 128, 32
    tokens = slots * rows

    def operands():
        ragged = _ragged(slots, rows, 4 * entries)
        rows_LBCH = _normal(2, slots, entries, width)
        if picks:
            # Of a slot, two queries' choices, or as many as `read` is.
            stride, kinds = entries // picks, read // picks
            own_TX = jnp.arange(tokens)[:, None] % kinds + stride * jnp.arange(picks)
            seen = {"chosen_TX": own_TX}
            table = Table(split_lanes(rows_LBCH), jnp.int32(1))
        else:
            seen = {"limits_T": jnp.full(tokens, read)}
            table = Table(rows_LBCH, jnp.int32(1))
        angle = _normal(tokens, turning, dtype=jnp.float32)
        return (
            _normal(tokens, heads, width),
            _normal(tokens, width),
            _normal(slots, window - 1, width),
            _normal(heads, dtype=jnp.float32),
            ragged,
            Entries(table, **seen),
            Rotary(jnp.cos(angle), jnp.sin(angle)),
        )

    def run(q, keys, before, sinks, ragged, entries, rotary, **options):
        operands = (q, keys, before, sinks, ragged, entries)
        turned = {"rotary": rotary, "query_norm": 1e-6}
        return sparse_attention(*operands, scale=width**-0.5, **turned, **options)

    return Problem(
        name=f"sparse_attention {name}",
        tried={"entries": (256, 512, 1024) if picks else (512, 1024, 2048)},
        operands=operands,
        run=run,
        known=(
            (sparse, "chunks_of", lambda sizes, *_: -(-read // sizes["entries"])),
            (sparse, "tokens_of", lambda sizes, *_: rows),
        ),
    )


def _dense_attention(name: str, slots: int, rows: int, positions: int) -> Problem:
    """Of Qwen3-8B's heads."""
    heads, shared, width = 32, 8, 128

    def operands():
        ragged = _ragged(slots, rows, positions - rows)
        limits_T = jnp.full(slots * rows, positions)
        k, v = (_normal(slots, shared, positions, width) for _ in range(2))
        return _normal(slots * rows, heads, width), k, v, ragged, limits_T

    def run(*operands, **options):
        return cached_attention(*operands, scale=width**-0.5, **options)

    return Problem(
        name=f"cached_attention {name}",
        tried={"rows" if rows > 64 else "positions": (256, 512, 1024)},
        operands=operands,
        run=run,
        known=(
            (attention, "chunks_of", lambda sizes, *_: positions // sizes["positions"]),
        ),
    )


def _index(name: str, rows: int, keys: int, picks: int) -> Problem:
    slots, heads, width = 2, 64, 128

    def operands():
        tokens = slots * rows
        table = Table(_normal(2, slots, keys, width), jnp.int32(1))
        weights_TN = _normal(tokens, heads, dtype=jnp.float32)
        index = Index(
            q_TNH=_normal(tokens, heads, width),
            weights_TN=weights_TN,
            keys=table,
            picks=picks,
        )
        return index, jnp.full(tokens, keys), _ragged(slots, rows, 4 * keys)

    return Problem(
        name=f"indexer_topk {name}",
        tried={"keys": (1024, 2048, 4096)},
        operands=operands,
        run=indexer_topk,
        known=((indexer, "chunks_of", lambda sizes, *_: -(-keys // sizes["keys"])),),
    )


# An eighth of the vocabulary of DeepSeek-V4, whose rows are 32 slots x 6.
_VOCABULARY = 129280 // 8
PROBLEMS = (
    _experts("flash up", "fp4", 4096, 4096, 8),
    _experts("flash down", "fp4", 4096, 2048, 8),
    _experts("flash up", "bfloat16", 4096, 4096, 8, 8),
    _experts("flash down", "bfloat16", 4096, 2048, 8, 8),
    _experts("pro up", "fp4", 6144, 7168, 8),
    _experts("pro down", "fp4", 7168, 3072, 8),
    _experts("flash up 128 rows", "fp4", 4096, 4096, 128, 8),
    _verification("flash", 4096, 192, _VOCABULARY),
    _verification("pro", 7168, 192, _VOCABULARY),
    _verification("dense", 4096, 2176, _VOCABULARY),
    _drafts("flash", 32, _VOCABULARY),
    _attention("flash chosen", 64, 6, 512, 1024),
    _attention("flash streamed", 64, 6, 0, 4096),
    _attention("pro chosen", 128, 6, 1024, 2048),
    _attention("pro streamed", 128, 6, 0, 4096),
    _dense_attention("decode", 8, 8, 4096),
    _dense_attention("prefill", 2, 512, 4096),
    _index("flash", 6, 32768, 512),
)
