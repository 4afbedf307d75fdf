"""compress: rings remember every row, entries are softmax pools of whole windows.

One suite for all implementations; kernels run in simulated memory of a TPU or a GPU,
where what was never written is NaN and two accesses that nothing orders are an error.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import Ragged, Table, compress
from pallas_kernels.compress import mosaic_tpu_append, mosaic_tpu_sizes
from pallas_kernels.compress.api import IMPLEMENTATIONS
from pallas_kernels.ragged import split_lanes

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
LAYERS, EPS, AMPLITUDE = 2, 1e-3, 1.25
# Positions of a page; windows end with it.
PAGE = 128


@dataclass(frozen=True)
class Kind:
    """Series and positions of a window, rows of the ring, entries of a slot."""

    series: int
    ratio: int
    ring: int
    entries: int = 64


KINDS = {
    "overlapping": Kind(2, 4, 32),
    "plain": Kind(1, 16, 48),
    "128": Kind(1, 128, 192, 16),
}
WIDTHS = {"xla": (6, 2), "mosaic_tpu": (256, 32), "mosaic_gpu": (256, 32)}


def simulated(implementation):
    """The memory that a kernel runs in."""
    careful = {"detect_races": True, "uninitialized_memory": "nan"}
    if implementation == "mosaic_tpu":
        return pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**careful))
    if implementation == "mosaic_gpu":
        return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**careful))
    return nullcontext()


class Case:
    """Slots in the middle of their texts, in float64."""

    def __init__(self, kind, implementation, starts, counts, seed=0):
        self.kind, self.implementation = kind, implementation
        self.H, h = WIDTHS[implementation]
        random = np.random.default_rng(seed)
        starts, counts = np.array(starts), np.array(counts)
        B, self.X = len(starts), 2 * kind.series * self.H
        ends = starts + counts
        self.text_BPX = random.normal(size=(B, ends.max(), self.X)).astype(np.float32)
        self.weight_H = random.normal(size=self.H).astype(np.float32)
        self.frequencies_h = random.random(h).astype(np.float32)
        offsets = np.cumsum([0, *counts[:-1]]) + (np.arange(B) > 0)
        T = counts.sum() + 3  # padding in between and behind
        slots, rows = np.full(T, -1), np.full((T, self.X), np.nan, np.float32)
        ring = np.full((LAYERS, B, kind.ring, self.X), np.nan, np.float32)
        for slot, (start, count, offset) in enumerate(zip(starts, counts, offsets)):
            slots[offset : offset + count] = slot
            rows[offset : offset + count] = self.text_BPX[slot, start : start + count]
            for position in range(max(start - kind.ring, 0), start):
                ring[1, slot, position % kind.ring] = self.text_BPX[slot, position]
        self.rows_TX, self.ring_LBSX = rows, ring
        self.starts, self.counts, self.ends = starts, counts, ends
        self.ragged = Ragged(
            slots_T=jnp.asarray(slots),
            starts_B=jnp.asarray(starts),
            offsets_B=jnp.asarray(offsets),
            counts_B=jnp.asarray(counts),
            rows=int(counts.max()),
        )

    def run(self, table, pages=None, **others):
        ragged = others.pop("ragged", self.ragged)
        with simulated(self.implementation):
            seen = run(
                jnp.asarray(self.rows_TX),
                Table(jnp.asarray(self.ring_LBSX), jnp.int32(1)),
                Table(table, jnp.int32(1), pages),
                jnp.asarray(self.weight_H),
                jnp.asarray(self.frequencies_h),
                ragged,
                ratio=self.kind.ratio,
                implementation=self.implementation,
            )
            return jax.device_get(jax.block_until_ready(seen))

    def expected_ring(self):
        ring = self.ring_LBSX.copy()
        for slot, (start, end) in enumerate(zip(self.starts, self.ends)):
            for position in range(start, end):
                ring[1, slot, position % self.kind.ring] = self.text_BPX[slot, position]
        return ring

    def ended(self):
        """Entries whose windows end in the pass, by slot."""
        m = self.kind.ratio
        for slot, (start, end) in enumerate(zip(self.starts, self.ends)):
            for position in range(start, end):
                if position % m == m - 1:
                    yield slot, position // m

    def entry(self, slot, entry):
        """The equation, in float64."""
        m, series, H = self.kind.ratio, self.kind.series, self.H
        values, logits = [], []
        for s in range(series):
            first = m * (entry + 1 - series + s)
            rows = self.text_BPX[slot, first : first + m] if first >= 0 else ()
            for row in np.asarray(rows, np.float64):
                values.append(row[s * H : (s + 1) * H])
                logits.append(row[(series + s) * H : (series + s + 1) * H])
        weights = np.exp(logits)
        c = (weights * values).sum(0) / weights.sum(0)
        c *= self.weight_H / np.sqrt((c**2).mean() + EPS)
        angles = m * entry * self.frequencies_h  # in float32, as positions are turned
        cos, sin = (AMPLITUDE * f(angles.astype(np.float64)) for f in (np.cos, np.sin))
        x, y = (
            c[H - 2 * len(angles) :: 2].copy(),
            c[H - 2 * len(angles) + 1 :: 2].copy(),
        )
        c[H - 2 * len(angles) :: 2] = x * cos - y * sin
        c[H - 2 * len(angles) + 1 :: 2] = y * cos + x * sin
        return c


@partial(jax.jit, static_argnames=("ratio", "implementation"))
def run(*operands, ratio, implementation):
    return compress(
        *operands,
        ratio=ratio,
        eps=EPS,
        amplitude=AMPLITUDE,
        implementation=implementation,
    )


def agrees(case, ring, table, before, place_of=lambda slot, entry: (slot, entry)):
    """Rows are where they belong, entries right, and all else is as it was."""
    np.testing.assert_array_equal(ring, case.expected_ring())
    mine = np.asarray(table, np.float64).reshape(*table.shape[:3], -1)
    before = np.asarray(before, np.float64).reshape(mine.shape).copy()
    for slot, entry in case.ended():
        place = place_of(slot, entry)
        if place is None:
            continue
        expected = case.entry(slot, entry)
        difference = np.abs(mine[1, *place] - expected).max()
        assert difference <= TOLERANCE[table.dtype.name] * np.abs(expected).max()
        before[1, *place] = mine[1, *place]
    np.testing.assert_array_equal(mine, before)


def around_every_boundary(kind, rows):
    """First positions and tokens of slots; some have none, some one."""
    m, S = kind.ratio, kind.ring
    starts = [0, 1, m - rows, m - 1, m, 2 * m - 1, S - m - 1, S - rows, S - 1, S, 2 * S]
    counts = [rows] * len(starts)
    counts[1:5] = 1, rows, 0, 1
    return np.maximum(starts, 0), counts


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return request.param


@pytest.fixture(autouse=True)
def one_by_one(monkeypatch):
    """Kernels of which little is unrolled."""
    monkeypatch.setattr(mosaic_tpu_sizes, "TOGETHER", 1)


def empty_table(case, blocks, size, dtype, apart=False):
    table = jnp.full((LAYERS, blocks, size, case.H), jnp.nan, dtype)
    return split_lanes(table) if apart and case.H % 128 == 0 else table


@pytest.mark.parametrize(
    ("kind", "dtype", "apart"),
    [
        ("overlapping", "float32", False),
        ("overlapping", "bfloat16", False),
        ("overlapping", "bfloat16", True),
        ("plain", "float32", True),
        ("128", "bfloat16", False),
    ],
)
def test_lengths_around_every_boundary(implementation, kind, dtype, apart):
    kind = KINDS[kind]
    case = Case(kind, implementation, *around_every_boundary(kind, 6))
    table = empty_table(case, len(case.starts), kind.entries, dtype, apart)
    agrees(case, *case.run(table), table)


def test_windows_that_end_together_share_rows_of_a_table(implementation, monkeypatch):
    """Thirteen tokens end three or four windows; some are computed together."""
    monkeypatch.setattr(mosaic_tpu_sizes, "TOGETHER", 2)
    kind = KINDS["overlapping"]
    case = Case(kind, implementation, [0, 2, 51, 60, 115], [13] * 5, seed=1)
    table = empty_table(case, 5, kind.entries, "bfloat16")
    agrees(case, *case.run(table), table)


@pytest.mark.parametrize("kind", KINDS)
def test_pages_of_ones_own_are_written_in_any_order(implementation, kind):
    kind = KINDS[kind]
    starts, counts = [125, 250, 60, 7], [6, 6, 6, 0]
    case = Case(kind, implementation, starts, counts, seed=2)
    size, count = PAGE // kind.ratio, 3
    pages = np.random.default_rng(3).permutation(4 * count).reshape(4, count) + 1
    pages[1, 1] *= -1  # shared
    pages[2, 0] = 0  # none
    table = empty_table(case, 4 * count + 1, size, "bfloat16", apart=size < 16)

    def place_of(slot, entry):
        page = pages[slot, entry // size]
        return (page, entry % size) if page > 0 else None

    places = [place_of(*each) for each in case.ended()]
    assert None in places and any(places)
    agrees(case, *case.run(table, jnp.asarray(pages)), table, place_of)


def test_entries_past_the_tables_end_are_left_out(implementation):
    kind = KINDS["overlapping"]
    case = Case(kind, implementation, [60, 58], [6, 6])
    table = empty_table(case, 2, 16, "float32")
    seen = case.run(table)
    agrees(case, *seen, table, lambda *place: place if place[1] < 16 else None)


@pytest.mark.parametrize("kind", KINDS)
def test_long_passes_end_many_windows(kind):
    """As prefill and training have them: longer than rings."""
    kind = KINDS[kind]
    rows = kind.ring + 2 * kind.ratio + 3
    case = Case(kind, "xla", [0, 5, 2 * kind.ratio - 1], [rows, rows - 9, 0], seed=4)
    table = empty_table(case, 3, kind.entries, "float32")
    agrees(case, *case.run(table), table)


def test_gradients_are_those_of_the_reference(implementation):
    kind = KINDS["overlapping"]
    case = Case(kind, implementation, [3, 9], [6, 4], seed=5)
    case.rows_TX, case.ring_LBSX = map(np.nan_to_num, (case.rows_TX, case.ring_LBSX))
    weights = np.random.default_rng(0).normal(size=(LAYERS, 2, 16, case.H))

    def loss(rows, ring, weight, by="xla"):
        pending, entries = run(
            rows,
            Table(ring, jnp.int32(1)),
            Table(jnp.zeros((LAYERS, 2, 16, case.H)), jnp.int32(1)),
            weight,
            jnp.asarray(case.frequencies_h),
            case.ragged,
            ratio=kind.ratio,
            implementation=by,
        )
        return jnp.sum(entries * weights) + jnp.sum(pending**2)

    operands = (jnp.asarray(x) for x in (case.rows_TX, case.ring_LBSX, case.weight_H))
    operands = tuple(operands)
    with simulated(implementation):
        mine = jax.grad(loss, (0, 1, 2))(*operands, implementation)
    random = np.random.default_rng(1)
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in operands]
        step = 1e-5
        for place, gradient in enumerate(mine):
            direction = random.normal(size=gradient.shape)
            moved = [
                loss(*wide[:place], wide[place] + sign * direction, *wide[place + 1 :])
                for sign in (step, -step)
            ]
            slope = (moved[0] - moved[1]) / (2 * step)
            np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-4)


def test_a_mistake_in_the_kernel_is_found(monkeypatch):
    """A window's last row is read before it is there."""
    kind = KINDS["plain"]
    case = Case(kind, "mosaic_tpu", [12, 30], [5, 2], seed=6)
    monkeypatch.setattr(
        mosaic_tpu_append, "tokens_of", lambda counts_ref, slot: counts_ref[slot] - 1
    )
    table = empty_table(case, 2, kind.entries, "float32")
    run.clear_cache()
    ring, entries = case.run(table)
    run.clear_cache()
    with pytest.raises(AssertionError):
        agrees(case, ring, entries, table)


def test_operands_that_the_kernel_does_not_take_are_refused_by_name():
    kind = KINDS["overlapping"]
    case = Case(kind, "mosaic_tpu", [0], [kind.ring - 6])
    table = empty_table(case, 1, 16, "float32")
    with pytest.raises(ValueError, match="26 tokens do not fit beside one in 32 rows"):
        case.run(table)
    case = Case(kind, "mosaic_tpu", [0], [6])
    with pytest.raises(ValueError, match="writes entries by 16, got 8 of a slot"):
        case.run(empty_table(case, 1, 8, "bfloat16"))
    with pytest.raises(ValueError, match="no implementation 'cuda'.*'xla'"):
        case.implementation = "cuda"
        case.run(table)
