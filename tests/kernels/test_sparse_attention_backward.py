"""Gradients of sparse_attention on Hopper GPUs, against the equations in float64.

The kernels run in simulated memory, in which what was never written is NaN and two
accesses that nothing orders are an error.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxspark.models import FlatTokens
from pallas_kernels import Entries, Rotary, Table, sparse_attention
from pallas_kernels.sparse_attention import (
    mosaic_gpu,
    mosaic_gpu_backward,
    mosaic_gpu_kernel,
)
from pallas_kernels.sparse_attention.mosaic_gpu_backward_lists import (
    blocks_of,
    tokens_of,
    words_of,
)
from pallas_kernels.sparse_attention.mosaic_gpu_backward_weights import CHUNKS
from pallas_kernels.sparse_attention.ref import recent_spans
from tests.kernels.test_sparse_attention import (
    accumulate,
    seen_of,
    seen_wgmma,
    turned,
)

HEADS, LOOKBACK, ENTRIES, PAGE = 64, 11, 80, 16
TOLERANCE = 1e-2
NAMES = "queries", "keys", "before", "sinks", "entries"


@pytest.fixture(autouse=True)
def seen_products(monkeypatch):
    monkeypatch.setattr(plgpu, "wgmma", partial(seen_wgmma, plgpu.wgmma))
    monkeypatch.setattr(mosaic_gpu_backward, "CORES", 7)


def simulated():
    return plgpu.force_gpu_interpret_mode(
        plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    )


class Case:
    """Three slots' tokens, one slot empty, and what they see, of which choices."""

    def __init__(self, rows, by, *, heads=HEADS, width=128, picks=40, seed=0):
        random = np.random.default_rng(seed)
        counts = np.array([rows, 0, max(rows - 2, 1)])
        starts = np.array([0, 2, 9])
        self.tokens = FlatTokens.from_rows(
            jnp.zeros((3, rows), jnp.int32), jnp.asarray(starts), jnp.asarray(counts),
            capacity=sum(counts) + 1,
        )  # fmt: skip
        self.slots = np.asarray(self.tokens.slots_T)
        T, H = len(self.slots), width
        shapes = [(T, heads, H), (T, H), (3, LOOKBACK, H), (heads,), (3, ENTRIES, H)]
        arrays = [random.normal(size=shape) for shape in shapes]
        arrays[0] *= (8 / H) ** 0.5  # scores as if heads were of width 8
        kinds = [jnp.bfloat16] * 3 + [jnp.float32, jnp.bfloat16]
        self.arrays = [jnp.asarray(x, kind) for x, kind in zip(arrays, kinds)]
        self.do = jnp.asarray(random.normal(size=shapes[0]), jnp.bfloat16)
        order = random.permuted(np.tile(np.arange(ENTRIES), (T, 1)), axis=-1)
        chosen = np.where(random.random((T, picks)) < 0.3, -1, order[:, :picks])
        chosen[0] = -1
        limits = random.integers(0, ENTRIES - 5, T)
        limits[0] = 0
        self.seen = {
            "chosen": seen_of(chosen, ENTRIES),
            "limits": np.arange(ENTRIES) < limits[:, None],
            "window": np.zeros((T, ENTRIES), bool),
        }[by]
        self.which = {
            "chosen": {"chosen_TX": jnp.asarray(chosen)},
            "limits": {"limits_T": jnp.asarray(limits)},
            "window": None,
        }[by]

    def table(self, *, paged):
        """The second of two layers, whole or in pages that lie in another order."""
        entries = np.asarray(self.arrays[4], np.float32)
        pages = None
        if paged:
            order = np.random.default_rng(3).permutation(3 * ENTRIES // PAGE)
            pages = order.reshape(3, -1)
            apart = np.zeros((len(order), PAGE, entries.shape[-1]), np.float32)
            apart[pages] = entries.reshape(3, -1, PAGE, entries.shape[-1])
            entries = apart
        rows = jnp.asarray(np.stack([entries + 1, entries]), jnp.bfloat16)
        return Table(rows, 1, None if pages is None else jnp.asarray(pages))

    def mine(
        self, o, lse, *, paged=False, causal=True, scale=0.3, norm=None, turn=None
    ):
        """The kernels', given the forward pass; of entries those of all layers."""
        table = self.table(paged=paged)
        entries = None if self.which is None else Entries(table, **self.which)
        operands = *self.arrays[:4], self.tokens, entries, turn
        saved = jnp.asarray(o, jnp.bfloat16), jnp.asarray(lse, jnp.float32)

        @jax.jit
        def run(operands, *saved):
            return mosaic_gpu_backward.backward(operands, *saved, scale, causal, norm)

        with simulated():
            grads = jax.block_until_ready(run(operands, *saved, self.do))
        grads = [None if x is None else np.asarray(x, np.float64) for x in grads]
        if entries is not None:
            others, rows = grads[-1]
            assert not others.any()
            pages = table.pages_BP
            rows = rows if pages is None else rows[np.asarray(pages)]
            grads[-1] = rows.reshape(3, ENTRIES, -1)
        return grads

    def expected(self, *, causal=True, scale=0.3, norm=None, angles=None):
        """The forward pass, and gradients by the equations, a token at a time."""
        q, keys, before, sinks, entries = (
            np.asarray(x, np.float64) for x in self.arrays
        )
        do = np.asarray(self.do, np.float64)
        length = np.ones((*q.shape[:2], 1))
        if norm is not None:
            length = 1 / np.sqrt((q**2).mean(-1, keepdims=True) + norm)
        met = q * length
        if angles is not None:
            met, do = turned(met, angles), turned(do, angles)
        o, lse = np.zeros_like(q), np.zeros(q.shape[:2])
        dq, dkeys, dbefore, dsinks, dentries = (
            np.zeros_like(x) for x in (q, keys, before, sinks, entries)
        )
        starts = np.asarray(self.tokens.starts_B)
        for t in np.flatnonzero(self.slots >= 0):
            slot = self.slots[t]
            own = np.flatnonzero(self.slots == slot)
            own = own[own <= t] if causal else own
            early = np.arange(max(LOOKBACK - starts[slot], 0), LOOKBACK)
            if causal:
                kept = max(LOOKBACK + 1 - len(own), 0)
                own = own[-(LOOKBACK + 1) :]
                early = early[len(early) - min(kept, len(early)) :]
            picked = np.flatnonzero(self.seen[t])
            k = np.concatenate([keys[own], before[slot, early], entries[slot, picked]])
            s = scale * met[t] @ k.T
            lse[t] = np.log(np.exp(s).sum(-1) + np.exp(sinks))
            p = np.exp(s - lse[t][:, None])
            o[t] = p @ k
            mean = (do[t] * o[t]).sum(-1)
            ds = p * (do[t] @ k.T - mean[:, None])
            dq[t] = scale * ds @ k
            dk = scale * ds.T @ met[t] + p.T @ do[t]
            dsinks -= np.exp(sinks - lse[t]) * mean
            a, b = len(own), len(own) + len(early)
            dkeys[own] += dk[:a]
            dbefore[slot, early] += dk[a:b]
            dentries[slot, picked] += dk[b:]
        if angles is not None:
            o, dq = turned(o, angles, -1), turned(dq, angles, -1)
        if norm is not None:
            unit = q * length
            dq = length * (dq - unit * (unit * dq).mean(-1, keepdims=True))
        return o, lse / np.log(2), (dq, dkeys, dbefore, dsinks, dentries)


def agrees(mine, expected):
    for name, got, want in zip(NAMES, mine, expected, strict=True):
        if got is None:
            continue
        assert np.isfinite(got).all(), name
        difference = np.abs(got - want).max()
        assert difference <= TOLERANCE * np.abs(want).max(), (name, difference)


@pytest.mark.parametrize(
    ("by", "paged"), [("chosen", False), ("chosen", True), ("limits", True)]
)
def test_gradients_are_those_of_the_equations(by, paged):
    """Of everything, entries of other layers included, which have none."""
    case = Case(4, by)
    *forward, expected = case.expected()
    agrees(case.mine(*forward, paged=paged), expected)


def test_queries_are_normed_and_turned_and_so_are_gradients():
    """Of two blocks of heads, whose halves are wider than what turns."""
    case = Case(3, "limits", heads=128, width=256, seed=1)
    angles = np.random.default_rng(1).normal(size=(len(case.slots), 3))
    turn = Rotary(*(jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin)))
    *forward, expected = case.expected(norm=0.1, angles=angles)
    agrees(case.mine(*forward, norm=0.1, turn=turn), expected)


def test_a_block_sees_all_of_itself():
    case = Case(5, "window", seed=2)
    *forward, expected = case.expected(causal=False)
    agrees(case.mine(*forward, causal=False), expected)


@pytest.mark.parametrize("by", ["window", "limits", "chosen"])
def test_blocks_of_rows_name_the_tokens_that_see_them(by):
    """All of them, no token of another slot, none too many at either end."""
    case, (recent, length) = Case(150, by, seed=6), (192, 320)
    which = (
        None if case.which is None else Entries(case.table(paged=False), **case.which)
    )
    ragged, slots = case.tokens, case.slots
    tokens_TK = tokens_of(ragged, which, LOOKBACK, True, recent, length)
    words = [words_of(which.chosen_TX, length - recent)] if by == "chosen" else []
    blocks = blocks_of(ragged, tokens_TK, *words, recent=recent, length=length)
    spans = ragged.flat(recent_spans(ragged, LOOKBACK))
    row = np.arange(recent)
    sees = (row >= np.asarray(spans)[:, :1]) & (row < np.asarray(spans)[:, 1:])
    behind = ((0, 0), (0, length - recent - ENTRIES))
    sees = np.concatenate([sees, np.pad(case.seen, behind)], axis=1)
    blocks = np.asarray(blocks).reshape(3, length // 64, 3)
    for (slot, block), (first, count, row) in zip(
        np.ndindex(blocks.shape[:2]), blocks.reshape(-1, 3)
    ):
        assert row == 64 * block
        here = sees[:, row : row + 64].any(1) & (slots == slot)
        tokens = np.flatnonzero(here)
        assert count == (tokens[-1] + 1 - tokens[0] if len(tokens) else 0)
        assert not len(tokens) or first == tokens[0]


def test_what_no_one_sees_need_not_be_a_number():
    """Padding, entries, and what would lie before position 0."""
    case = Case(3, "chosen", seed=3)
    *forward, expected = case.expected(norm=0.1)
    slots = [case.slots == slot for slot in range(3)]
    hidden = np.array([~case.seen[each].any(0) for each in slots])
    missing = LOOKBACK - np.asarray(case.tokens.starts_B)[:, None]
    q, keys, before, sinks, entries = case.arrays
    q = q.at[case.slots < 0].set(jnp.nan)
    before = jnp.where((np.arange(LOOKBACK) < missing)[..., None], jnp.nan, before)
    entries = jnp.where(hidden[..., None], jnp.nan, entries)
    case.arrays = [q, keys, before, sinks, entries]
    agrees(case.mine(*forward, norm=0.1), expected)


def test_the_op_keeps_what_its_gradients_need(monkeypatch):
    """Also where a query's rows were read in parts."""
    monkeypatch.setattr(mosaic_gpu, "TILES", (32, 32))
    monkeypatch.setattr(mosaic_gpu_kernel, "accumulate", accumulate)
    monkeypatch.setattr(mosaic_gpu, "parts_of", lambda *args: 2)
    case = Case(2, "limits", seed=4)
    table = case.table(paged=False)

    @jax.jit
    def gradients(arrays, rows, do):
        def of(*arrays):
            *others, rows = arrays
            which = Entries(table.having(rows), **case.which)
            return sparse_attention(
                *others, case.tokens, which, scale=0.3, implementation="mosaic_gpu"
            )

        return jax.vjp(of, *arrays, rows)[1](do)

    with simulated():
        mine = jax.block_until_ready(
            gradients(case.arrays[:4], table.rows_LBCH, case.do)
        )
    *mine, (_, rows) = (np.asarray(x, np.float64) for x in mine)
    *_, expected = case.expected()
    agrees([*mine, rows], expected)


@pytest.mark.parametrize(
    ("what", "column", "wrong"),
    [("tokens_of", CHUNKS, "queries"), ("blocks_of", 1, "keys")],
)
def test_a_mistake_is_found(monkeypatch, what, column, wrong):
    """A chunk too few for a token, a token too few for a block of rows."""
    right = getattr(mosaic_gpu_backward, what)
    monkeypatch.setattr(
        mosaic_gpu_backward,
        what,
        lambda *args, **options: right(*args, **options).at[:, column].add(-1),
    )
    case = Case(2, "window", seed=5)
    *forward, expected = case.expected()
    with pytest.raises(AssertionError, match=wrong):
        agrees(case.mine(*forward), expected)
