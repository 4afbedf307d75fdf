"""sparse_attention: one softmax over recent rows, entries and a sink.

One suite for all implementations; kernels run in simulated memory of a TPU or a GPU,
where what was never written is NaN and two accesses that nothing orders are an error.
"""

from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from jaxspark.models import FlatTokens
from pallas_kernels import (
    Entries,
    Index,
    Rotary,
    Table,
    index_scores,
    rings,
    sparse_attention,
    top_k,
)
from pallas_kernels.index_scores import ref as index_ref
from pallas_kernels.ragged import split_lanes
from pallas_kernels.sparse_attention import (
    mosaic_gpu,
    mosaic_gpu_kernel,
    mosaic_gpu_lists,
    mosaic_gpu_rows,
    mosaic_tpu_chunks,
    mosaic_tpu_kernel,
    mosaic_tpu_queries,
    plan,
)

# Heads, their width, positions before a pass, entries of a slot and of a page.
SIZES = {
    "xla": (3, 8, 3, 12, 4),
    "mosaic_tpu": (8, 256, 11, 272, 16),
    "mosaic_gpu": (64, 256, 11, 144, 16),
}
STARTS = np.array([0, 2, 9])
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
SIMULATED = {
    "xla": nullcontext,
    "mosaic_tpu": lambda: pltpu.force_tpu_interpret_mode(
        pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    ),
    "mosaic_gpu": lambda: plgpu.force_gpu_interpret_mode(
        plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    ),
}


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Kernels of which little is unrolled, with chunks that few entries fill."""
    monkeypatch.setattr(mosaic_tpu_chunks, "TOGETHER", 1)
    monkeypatch.setattr(mosaic_tpu_chunks, "AS_WORDS", False)
    monkeypatch.setattr(mosaic_tpu_queries, "AS_WORDS", False)
    monkeypatch.setattr(plan, "TILE", 128)
    monkeypatch.setattr(mosaic_gpu, "TILES", (32, 32))
    monkeypatch.setattr(mosaic_gpu_kernel, "accumulate", accumulate)
    monkeypatch.setattr(plgpu, "wgmma", partial(seen_wgmma, plgpu.wgmma))


def seen_wgmma(wgmma, acc_ref, a_ref, b_ref):
    """A product whose reads the detector of races sees, as it sees no product's."""
    for each in (a_ref, b_ref):
        each[...]
    plgpu.commit_smem()  # The matrix units' reads need no fence, these do.
    wgmma(acc_ref, a_ref, b_ref)


def accumulate(acc_NH, p_NS, k_ref, meanwhile):
    """The kernel's product; rows are read to the end of what goes on meanwhile."""
    meanwhile()
    o_NH = jnp.dot(p_NS, k_ref[...], preferred_element_type=jnp.float32)
    plgpu.commit_smem()
    return acc_NH + o_NH


@pytest.fixture(params=SIZES, scope="module")
def attend(request):
    """The op by one implementation, compiled once for every shape."""
    return Attend(request.param)


class Attend:
    def __init__(self, implementation):
        self.implementation = implementation
        self.sizes = SIZES[implementation]
        self.is_kernel = implementation != "xla"
        self.dtype = jnp.bfloat16 if implementation == "mosaic_gpu" else jnp.float32

        def run(*operands, scale=0.3, **options):
            return sparse_attention(
                *operands, scale=scale, **options, implementation=implementation
            )

        self.run = jax.jit(run, static_argnames=("scale", "causal", "query_norm"))

    def __call__(self, *operands, **options):
        with SIMULATED[self.implementation]():
            return jax.block_until_ready(self.run(*operands, **options))

    def made(self, rows, picks, seed=0, starts=STARTS, counts=None):
        """Ragged tokens of three slots, their recent rows, entries and choices."""
        N, H, lookback, C, _ = self.sizes
        random = np.random.default_rng(seed)
        if counts is None:
            counts = np.array([rows, 0, max(rows - 2, 1)])
        tokens = FlatTokens.from_rows(
            jnp.zeros((3, rows), jnp.int32), jnp.asarray(starts), jnp.asarray(counts),
            capacity=2 * rows + 2,
        )  # fmt: skip
        T = len(tokens.slots_T)
        q, keys = random.normal(size=(T, N, H)), random.normal(size=(T, H))
        before = random.normal(size=(3, lookback, H))
        entries, sinks = random.normal(size=(3, C, H)), random.normal(size=N)
        # Scores as if heads were of width 8.
        q *= (8 / H) ** 0.5
        order = random.permuted(np.tile(np.arange(C), (T, 1)), axis=-1)
        chosen = np.where(random.random((T, picks)) < 0.3, -1, order[:, :picks])
        limits = random.integers(0, C + 1, T)
        arrays = (jnp.asarray(x, self.dtype) for x in (q, keys, before, sinks, entries))
        return tokens, *arrays, *map(jnp.asarray, (chosen, limits))

    def tables(self, entries, *, apart):
        """The second of two layers, whole and in pages that lie in another order."""
        _, H, _, C, page = self.sizes
        order = np.random.default_rng(3).permutation(3 * C // page).reshape(3, -1)
        pages = np.zeros((3 * C // page, page, H), entries.dtype)
        pages[order] = entries.reshape(3, -1, page, H)
        apart = apart and H % 256 == 0
        split = split_lanes if apart else jnp.asarray
        yield Table(split(jnp.stack([entries + 1, entries])), 1)
        yield Table(split(jnp.stack([pages + 1, pages])), 1, jnp.asarray(order))


def plain(
    tokens,
    q,
    keys,
    before,
    sinks,
    entries=None,
    seen_TC=None,
    *,
    causal=True,
    scale=0.3,
):
    """The equation, one query and head after the other, in float64."""
    out = np.zeros(q.shape)
    slots, starts = np.asarray(tokens.slots_T), np.asarray(tokens.starts_B)
    q, keys, before, sinks = (
        np.asarray(x, np.float64) for x in (q, keys, before, sinks)
    )
    for t, n in np.ndindex(q.shape[:2]):
        if (slot := slots[t]) < 0:
            continue
        own = np.flatnonzero(slots == slot)
        row = int(np.flatnonzero(own == t)[0])
        real = before[slot][max(len(before[slot]) - starts[slot], 0) :]
        rows = np.concatenate([real, keys[own[: row + 1]] if causal else keys[own]])
        if causal:
            rows = rows[-(before.shape[1] + 1) :]
        if entries is not None:
            rows = np.concatenate([rows, np.asarray(entries[slot])[seen_TC[t]]])
        weights = np.exp(scale * rows.astype(np.float64) @ q[t, n])
        out[t, n] = weights @ rows / (weights.sum() + np.exp(sinks[n]))
    return out


def turned(x, angles, sign=1):
    """The last channels as complex numbers, in float64."""
    x, width = np.array(x, np.float64), 2 * angles.shape[1]
    pairs = x[..., -width::2] + 1j * x[..., 1 - width :: 2]
    pairs *= np.exp(sign * 1j * angles)[:, None]
    x[..., -width::2], x[..., 1 - width :: 2] = pairs.real, pairs.imag
    return x


def agrees(tokens, mine, expected):
    real, dtype = np.asarray(tokens.slots_T) >= 0, mine.dtype.name
    assert np.isfinite(np.asarray(mine, np.float32)).all()
    difference = np.abs(np.asarray(mine, np.float64) - expected)[real].max()
    assert difference <= TOLERANCE[dtype] * np.abs(expected).max()


def seen_of(chosen, C):
    """Choices as a mask."""
    seen = np.zeros((len(chosen), C), bool)
    for t, each in enumerate(np.asarray(chosen)):
        seen[t, each[each >= 0]] = True
    return seen


# Few choices are gathered, many are masked; long passes go block by block.
@pytest.mark.parametrize(
    ("rows", "picks"), [(1, 1), (3, 5), (4, 1), (5, 5), (11, 1), (11, 5)]
)
def test_chosen_entries(attend, rows, picks):
    if attend.is_kernel:
        sizes = [(1, 1), (3, 5)]
        if attend.implementation == "mosaic_tpu":  # groups of queries in long passes
            sizes += [(11, 5)]
        if (rows, picks) not in sizes:
            pytest.skip("other sizes run the same program")
        picks *= 14 if rows < 11 else 4  # the union fills more than a chunk
    tokens, q, keys, before, sinks, entries, chosen, _ = attend.made(rows, picks)
    seen = seen_of(chosen, entries.shape[1])
    expected = plain(tokens, q, keys, before, sinks, entries, seen)
    for mine in list(attend.tables(entries, apart=True))[:: 1 if rows < 11 else 2]:
        which = Entries(mine, chosen_TX=chosen)
        agrees(tokens, attend(q, keys, before, sinks, tokens, which), expected)


def test_the_best_by_an_index_are_seen(attend):
    """What the op chooses is what it is told that it would choose."""
    picks = 4 if attend.implementation == "xla" else 70
    tokens, q, keys, before, sinks, entries, _, limits = attend.made(3, 1, seed=3)
    random, (B, C, _) = np.random.default_rng(0), entries.shape
    index = Index(
        q_TNH=jnp.asarray(random.integers(-3, 4, (len(q), 8, 128)), jnp.float32),
        weights_TN=jnp.asarray(random.integers(-3, 4, (len(q), 8)), jnp.float32),
        keys=Table(jnp.asarray(random.integers(-3, 4, (1, B, C, 128)), jnp.float32)),
        picks=picks,
    )
    scores = index_scores(index.q_TNH, index.keys, index.weights_TN, tokens)
    seen = seen_of(top_k(scores, limits, k=picks), C)
    expected = plain(tokens, q, keys, before, sinks, entries, seen)
    table = next(attend.tables(entries, apart=True))
    which = Entries(table, limits_T=limits, index=index)
    agrees(tokens, attend(q, keys, before, sinks, tokens, which), expected)


@pytest.mark.parametrize("agree", [True, False])
def test_unions_of_any_size(attend, agree):
    """All queries of a slot choose the same entries, or no two of them any."""
    picks = attend.sizes[3] // 4 if attend.is_kernel else 4
    tokens, q, keys, before, sinks, entries, *_ = attend.made(3, picks, seed=1)
    first = 0 if agree else picks * np.asarray(tokens.rows_T)[:, None]
    chosen = jnp.asarray(np.broadcast_to(first + np.arange(picks), (len(q), picks)))
    seen = seen_of(chosen, entries.shape[1])
    expected = plain(tokens, q, keys, before, sinks, entries, seen)
    table = next(attend.tables(entries, apart=True))
    which = Entries(table, chosen_TX=chosen)
    agrees(tokens, attend(q, keys, before, sinks, tokens, which), expected)


@pytest.mark.parametrize("rows", [1, 4, 11])
def test_entries_below_a_limit(attend, rows):
    if attend.is_kernel and rows == 1:
        pytest.skip("more rows run the same program")
    tokens, q, keys, before, sinks, entries, _, limits = attend.made(rows, 1)
    C = entries.shape[1]
    for edge in (0, 31, 127, 128, 129, C):  # also all that ends or fills a chunk
        limits = limits.at[edge % len(limits)].set(min(edge, C))
    seen = np.arange(C) < np.asarray(limits)[:, None]
    expected = plain(tokens, q, keys, before, sinks, entries, seen)
    for mine in list(attend.tables(entries, apart=False))[:: 1 if rows < 11 else 2]:
        which = Entries(mine, limits_T=limits)
        agrees(tokens, attend(q, keys, before, sinks, tokens, which), expected)


def test_pages_of_one_entry_are_read_below_a_limit(monkeypatch):
    """As the entries of 128 positions lie in pages of 128 positions."""
    attend = Attend("mosaic_tpu")
    monkeypatch.setattr(attend, "sizes", (*attend.sizes[:4], 1))
    tokens, q, keys, before, sinks, entries, _, limits = attend.made(3, 1, seed=6)
    C = entries.shape[1]
    limits = limits.at[0].set(C).at[1].set(129)
    seen = np.arange(C) < np.asarray(limits)[:, None]
    expected = plain(tokens, q, keys, before, sinks, entries, seen)
    *_, table = attend.tables(entries, apart=True)
    which = Entries(table, limits_T=limits)
    agrees(tokens, attend(q, keys, before, sinks, tokens, which), expected)


@pytest.mark.parametrize("rows", [1, 5, 11])
def test_a_block_sees_all_of_itself(attend, rows):
    if attend.is_kernel and rows < 11:
        pytest.skip("more rows run the same program")
    tokens, q, keys, before, sinks, *_ = attend.made(rows, 1)
    seen = attend(q, keys, before, sinks, tokens, causal=False)
    agrees(tokens, seen, plain(tokens, q, keys, before, sinks, causal=False))


@pytest.mark.parametrize(
    ("norm", "dtype"), [(None, None), (0.1, None), (0.1, "bfloat16")]
)
def test_queries_are_normed_and_turned_and_outputs_turned_back(attend, norm, dtype):
    """By heads' own norms and tokens' own angles; 11 rows are two groups."""
    if dtype == jnp.dtype(attend.dtype):
        pytest.skip("all tests of this kernel are in bfloat16")
    dtype = dtype or attend.dtype
    tokens, *arrays, _, limits = attend.made(11, 1, seed=3)
    q, keys, before, sinks, entries = (x.astype(dtype) for x in arrays)
    q *= jnp.arange(1.0, 1 + q.shape[1], dtype=dtype)[:, None]
    angles = np.random.default_rng(1).normal(size=(len(q), 3))
    rotary = Rotary(*(jnp.asarray(f(angles), "float32") for f in (np.cos, np.sin)))
    expected = np.asarray(q, np.float64)
    if norm is not None:
        expected /= np.sqrt((expected**2).mean(-1, keepdims=True) + norm)
    expected = turned(expected, angles)
    seen = np.arange(entries.shape[1]) < np.asarray(limits)[:, None]
    scale = 0.3 if norm is None else q.shape[2] ** -0.5
    expected = plain(tokens, expected, keys, before, sinks, entries, seen, scale=scale)
    expected = turned(expected, angles, -1)
    which = Entries(next(attend.tables(entries, apart=False)), limits_T=limits)
    mine = attend(
        *(q, keys, before, sinks, tokens, which),
        scale=scale,
        rotary=rotary,
        query_norm=norm,
    )
    agrees(tokens, mine, expected)


def test_groups_share_tiles_of_queries_and_replace_them():
    """On TPUs: 19 tokens are three groups, in three tiles or from within one on."""
    attend = Attend("mosaic_tpu")
    tokens, q, keys, before, sinks, *_ = attend.made(19, 1, seed=9)
    seen = attend(q, keys, before, sinks, tokens)
    agrees(tokens, seen, plain(tokens, q, keys, before, sinks))


def test_lengths_around_the_windows_edge(attend):
    """One program, slots that begin anywhere, some of them empty."""
    lookback = attend.sizes[2]
    for shift, counts in ((-1, [4, 0, 4]), (0, [0, 4, 1]), (1, [0, 0, 4])):
        starts = np.array([lookback + shift, 0, lookback - 2 + shift])
        tokens, q, keys, before, sinks, *_ = attend.made(
            4, 1, shift + 5, starts, np.array(counts)
        )
        seen = attend(q, keys, before, sinks, tokens)
        agrees(tokens, seen, plain(tokens, q, keys, before, sinks))


@pytest.mark.parametrize(("rows", "length"), [(4, 16), (11, 32)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recent_rows_are_read_out_of_their_ring(attend, rows, length, dtype):
    """The second layer's, that holds the pass too, which goes past its end; 11 rows are
    two groups. What else the ring holds is seen by no one."""
    if attend.is_kernel and dtype != attend.dtype.dtype.name and rows == 4:
        pytest.skip("one type for each size")
    lookback = attend.sizes[2]
    starts = np.array([0, 2, 3 * length - 3])
    counts = np.array([rows, 0, rows - 1])
    tokens, *arrays, _, limits = attend.made(rows, 1, 11, starts, counts)
    dtype = jnp.bfloat16 if attend.dtype == jnp.bfloat16 else dtype
    q, keys, before, sinks, entries = (x.astype(dtype) for x in arrays)
    ring = np.random.default_rng(2).normal(9, 1, (2, 3, length, q.shape[2]))
    for slot, start in enumerate(starts):
        for back in range(1, min(lookback, start) + 1):
            ring[1, slot, (start - back) % length] = before[slot, -back]
    held = Table(jnp.asarray(ring, dtype), 1)
    held = rings.append(held, tokens.positions_T, keys, tokens)
    seen = np.arange(entries.shape[1]) < np.asarray(limits)[:, None]
    expected = plain(tokens, q, keys, before, sinks, entries, seen)
    which = Entries(next(attend.tables(entries, apart=False)), limits_T=limits)
    mine = attend(q, keys, rings.Lookback(held, lookback), sinks, tokens, which)
    agrees(tokens, mine, expected)


def test_what_no_query_sees_of_a_ring_may_be_no_number():
    attend = Attend("mosaic_gpu")
    rows, length, lookback = 11, 32, attend.sizes[2]
    for starts in ([0, 2, 3 * length - 3], [13, 5, length + 2]):
        tokens, q, keys, before, sinks, entries, _, limits = attend.made(
            rows, 1, 12, np.array(starts), np.array([rows, 0, rows - 1])
        )
        ring = np.full((2, 3, length, q.shape[2]), np.nan)
        for slot, start in enumerate(starts):
            for back in range(1, min(lookback, start) + 1):
                ring[1, slot, (start - back) % length] = before[slot, -back]
        held = Table(jnp.asarray(ring, attend.dtype), 1)
        held = rings.append(held, tokens.positions_T, keys, tokens)
        seen = np.arange(entries.shape[1]) < np.asarray(limits)[:, None]
        which = Entries(next(attend.tables(entries, apart=False)), limits_T=limits)
        mine = attend(q, keys, rings.Lookback(held, lookback), sinks, tokens, which)
        agrees(tokens, mine, plain(tokens, q, keys, before, sinks, entries, seen))


@pytest.mark.parametrize("by", ["chosen", "limits"])
def test_bfloat16_sums_in_float32(attend, by):
    if attend.dtype == jnp.bfloat16:
        pytest.skip("all tests of this kernel are in bfloat16")
    tokens, *arrays, chosen, limits = attend.made(3, 10, seed=2)
    q, keys, before, sinks, entries = (x.astype(jnp.bfloat16) for x in arrays)
    if by == "chosen":
        seen = seen_of(chosen, entries.shape[1])
    else:
        seen = np.arange(entries.shape[1]) < np.asarray(limits)[:, None]
    table = next(attend.tables(entries, apart=by == "chosen"))
    which = {"chosen_TX": chosen} if by == "chosen" else {"limits_T": limits}
    mine = attend(q, keys, before, sinks, tokens, Entries(table, **which))
    assert mine.dtype == jnp.bfloat16
    agrees(tokens, mine, plain(tokens, q, keys, before, sinks, entries, seen))


def test_many_heads_are_as_many_blocks_of_threads():
    """And choices that differ from token to token, some of none at all."""
    attend = Attend("mosaic_gpu")
    attend.sizes = (128, 128, 11, 272, 16)
    tokens, q, keys, before, sinks, entries, chosen, _ = attend.made(2, 20, seed=6)
    chosen = chosen.at[0].set(-1)
    seen = seen_of(chosen, entries.shape[1])
    expected = plain(tokens, q, keys, before, sinks, entries, seen)
    which = Entries(next(attend.tables(entries, apart=False)), chosen_TX=chosen)
    agrees(tokens, attend(q, keys, before, sinks, tokens, which), expected)


@pytest.mark.parametrize("by", ["chosen", "limits"])
def test_parts_of_what_a_query_reads_make_the_whole(monkeypatch, by):
    """Some queries have fewer chunks than there are parts."""
    monkeypatch.setattr(mosaic_gpu, "parts_of", lambda *args: 3)
    attend = Attend("mosaic_gpu")
    tokens, q, keys, before, sinks, entries, chosen, limits = attend.made(2, 70, seed=8)
    chosen, limits = chosen.at[0].set(-1), limits.at[0].set(0).at[1].set(33)
    if by == "chosen":
        which, seen = {"chosen_TX": chosen}, seen_of(chosen, entries.shape[1])
    else:
        which = {"limits_T": limits}
        seen = np.arange(entries.shape[1]) < np.asarray(limits)[:, None]
    expected = plain(tokens, q, keys, before, sinks, entries, seen)
    which = Entries(next(attend.tables(entries, apart=False)), **which)
    agrees(tokens, attend(q, keys, before, sinks, tokens, which), expected)


@pytest.mark.parametrize(("blocks", "parts"), [(1, 27), (6, 22), (192, 2), (4096, 1)])
def test_a_few_queries_are_cut_to_as_many_parts_as_fill_the_chip(blocks, parts):
    """Of a million positions, 8,192 entries in chunks of 64 and some recent rows."""
    assert mosaic_gpu_lists.parts_of(blocks, chunks=131, tile=64) == parts


@pytest.mark.parametrize("by", ["chosen", "limits"])
def test_what_no_one_sees_need_not_be_a_number(by):
    """Nor what would lie before position 0."""
    attend = Attend("mosaic_gpu")
    made = attend.made(2, 20, seed=7)
    tokens, q, keys, before, sinks, entries, chosen, limits = made
    if by == "chosen":
        which, seen = {"chosen_TX": chosen}, seen_of(chosen, entries.shape[1])
    else:
        limits = jnp.minimum(limits, 100)
        which = {"limits_T": limits}
        seen = np.arange(entries.shape[1]) < np.asarray(limits)[:, None]
    expected = plain(tokens, q, keys, before, sinks, entries, seen)
    slots, starts = np.asarray(tokens.slots_T), np.asarray(tokens.starts_B)
    hidden = np.array([~seen[slots == slot].any(0) for slot in range(3)])
    entries = jnp.where(hidden[..., None], jnp.nan, entries)
    lookback = before.shape[1]
    nowhere = np.arange(lookback) < lookback - starts[:, None]
    before = jnp.where(nowhere[..., None], jnp.nan, before)
    which = Entries(next(attend.tables(entries, apart=False)), **which)
    agrees(tokens, attend(q, keys, before, sinks, tokens, which), expected)


@pytest.mark.parametrize("by", ["chosen", "limits"])
def test_gradients_are_those_of_the_reference(by):
    """On TPUs; of everything, entries of other layers included."""
    attend, reference = Attend("mosaic_tpu"), Attend("xla")
    # Two chunks, or two groups of queries and three chunks.
    made = attend.made(3 if by == "chosen" else 9, 50, seed=4)
    tokens, q, keys, before, sinks, entries, chosen, limits = made
    table = next(attend.tables(entries, apart=by == "chosen"))
    named = {"chosen_TX": chosen} if by == "chosen" else {"limits_T": limits}
    do = np.random.default_rng(0).normal(size=q.shape).astype(q.dtype)
    do[np.asarray(tokens.slots_T) < 0] = 0
    around = {}
    if by == "limits":  # Queries are normed and turned, outputs turned back.
        angles = jnp.linspace(0.0, 3.0, 2 * len(q)).reshape(-1, 2)
        around = {"rotary": Rotary(jnp.cos(angles), jnp.sin(angles)), "query_norm": 0.1}

    def gradients(attend):
        def of(q, keys, before, sinks, rows):
            which = Entries(Table(rows, table.layer), **named)
            return attend.run(q, keys, before, sinks, tokens, which, **around)

        with SIMULATED[attend.implementation]():
            _, back = jax.vjp(of, q, keys, before, sinks, table.rows_LBCH)
            return jax.block_until_ready(back(do))

    for mine, expected in zip(gradients(attend), gradients(reference), strict=True):
        assert mine.dtype == expected.dtype
        mine, expected = (np.asarray(x, np.float32) for x in (mine, expected))
        scale = np.abs(expected).max()
        np.testing.assert_allclose(mine, expected, atol=1e-5 * scale + 1e-30)


@pytest.mark.parametrize(
    "kernel", ["mosaic_tpu", pytest.param("mosaic_gpu", marks=pytest.mark.long)]
)
def test_gradients_reach_rows_in_their_ring(kernel):
    """Which are those of the rows before the pass; its own have theirs."""
    attend, length, starts = Attend(kernel), 16, np.array([0, 2, 45])
    tokens, *arrays = attend.made(4, 1, 13, starts, np.array([4, 0, 3]))
    q, keys, _, sinks, *_ = (x.astype(attend.dtype) for x in arrays)
    ring = np.random.default_rng(0).normal(size=(1, 3, length, q.shape[2]))
    held = rings.append(
        Table(jnp.asarray(ring, attend.dtype)), tokens.positions_T, keys, tokens
    )
    do = np.random.default_rng(1).normal(size=q.shape).astype(q.dtype)
    do[np.asarray(tokens.slots_T) < 0] = 0

    def gradients(attend):
        def of(q, keys, rows):
            back = rings.Lookback(held.having(rows), attend.sizes[2])
            return attend.run(q, keys, back, sinks, tokens)

        with SIMULATED[kernel]():
            _, back = jax.vjp(of, q, keys, held.rows_LBCH)
            return jax.block_until_ready(back(do))

    reference = Attend("xla")
    reference.sizes = attend.sizes
    for mine, expected in zip(gradients(attend), gradients(reference), strict=True):
        mine, expected = (np.asarray(x, np.float32) for x in (mine, expected))
        tolerance = 1e-2 if attend.dtype == jnp.bfloat16 else 1e-5
        scale = np.abs(expected).max()
        np.testing.assert_allclose(mine, expected, atol=tolerance * scale)


def test_rows_read_as_words_are_the_rows():
    rows = np.arange(2 * 32 * 512.0).reshape(2, 32, 4, 128).astype(jnp.bfloat16)
    halves = rows.view(np.uint16).astype(np.uint32)
    words = jnp.asarray(halves[:, :, ::2] | halves[:, :, 1::2] << 16)

    def kernel(words_ref, o_ref):
        o_ref[...] = mosaic_tpu_chunks.rows_of_words(words_ref, 1)

    shape = jax.ShapeDtypeStruct((32, 512), rows.dtype)
    interpret = pltpu.InterpretParams()
    seen = pl.pallas_call(kernel, out_shape=shape, interpret=interpret)(words)
    np.testing.assert_array_equal(np.asarray(seen), rows[1].reshape(32, 512))


@pytest.mark.parametrize("kernel", ["mosaic_tpu", "mosaic_gpu"])
def test_a_mistake_in_the_kernel_is_found(monkeypatch, kernel):
    """A chunk too few, or a limit too high by one."""
    attend = Attend(kernel)
    tokens, q, keys, before, sinks, entries, _, limits = attend.made(4, 1)
    seen = np.arange(entries.shape[1]) < np.asarray(limits)[:, None]
    expected = plain(tokens, q, keys, before, sinks, entries, seen)
    which = Entries(next(attend.tables(entries, apart=False)), limits_T=limits)
    chunks_of, per_token = mosaic_tpu_kernel.chunks_of, mosaic_gpu.per_token
    monkeypatch.setattr(
        mosaic_tpu_kernel, "chunks_of", lambda *args: chunks_of(*args) - 1
    )
    monkeypatch.setattr(
        mosaic_gpu, "per_token", lambda *args: per_token(*args).at[:, 6].add(1)
    )
    mine = attend(q, keys, before, sinks, tokens, which)
    with pytest.raises(AssertionError):
        agrees(tokens, mine, expected)


def test_what_the_kernel_cannot_do_is_said():
    tokens, q, keys, before, sinks, entries, chosen, limits = Attend("mosaic_tpu").made(
        2, 1
    )
    rows, odd = entries[None], entries[None, :, :9]
    for reason, operands in {
        "multiples of 8": (q[:, :3], keys, before, sinks[:3], tokens),
        "single entries": (
            *(q, keys, before, sinks, tokens),
            Entries(Table(rows), chosen_TX=chosen),
        ),
        "by 8, got 9": (
            *(q, keys, before, sinks, tokens),
            Entries(Table(odd), limits_T=limits),
        ),
        "one type": (q, keys.astype(jnp.bfloat16), before, sinks, tokens),
    }.items():
        with pytest.raises(ValueError, match=reason):
            sparse_attention(*operands, scale=1, implementation="mosaic_tpu")
        # The reference can.
        jax.eval_shape(partial(sparse_attention, scale=1), *operands)


def test_a_gpu_copies_whole_tiles():
    """Which the simulator does not ask for, and a GPU would round down to."""
    attend = Attend("mosaic_gpu")
    lookback, size = attend.sizes[2], mosaic_gpu_rows.TILE_ROWS
    starts = np.array([0, 5, 20])
    tokens, _, keys, before, _, entries, _, limits = attend.made(11, 1, starts=starts)
    _, *where = mosaic_gpu_lists.recent(before, keys, tokens)
    for table in attend.tables(entries, apart=False):
        which = Entries(table, limits_T=limits)
        planned = plan.Plan.of(
            tokens, which, lookback, True, 1, queries=1, tiles=(32, 32)
        )
        first_T = mosaic_gpu.per_token(planned, tokens, 32, *where)[:, 1]
        for starts in (first_T, planned.pieces, planned.piece):
            assert not (np.asarray(starts) % size).any()
        assert np.asarray(first_T).max() > 0


def test_what_a_gpu_cannot_do_is_said():
    made = Attend("mosaic_gpu").made(2, 1)
    tokens, q, keys, before, sinks, entries, chosen, limits = made
    single = [x.astype(jnp.float32) for x in (q, keys, before)]
    for reason, operands in {
        "multiples of 64": (q[:, :3], keys, before, sinks[:3], tokens),
        "no float32": (*single, sinks, tokens),
        "by 8, got 9": (
            *(q, keys, before, sinks, tokens),
            Entries(Table(entries[None, :, :9]), limits_T=limits),
        ),
        "8192 chosen": (
            *(q, keys, before, sinks, tokens),
            Entries(Table(entries[None]), chosen_TX=jnp.tile(chosen, (1, 9000))),
        ),
    }.items():
        with pytest.raises(ValueError, match=reason):
            sparse_attention(*operands, scale=1, implementation="mosaic_gpu")
        jax.eval_shape(partial(sparse_attention, scale=1), *operands)


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB"])
def test_the_kernel_is_taken_on_hopper_unasked(monkeypatch, name):
    monkeypatch.undo()  # of what is for simulations
    tokens, q, keys, before, sinks, *_ = Attend("mosaic_gpu").made(2, 1)
    chip = AbstractDevice(device_kind=name, num_cores=132, platform="gpu")
    axes = (AxisType.Auto,)
    with use_abstract_mesh(AbstractMesh((1,), ("x",), axes, abstract_device=chip)):
        run = jax.jit(partial(sparse_attention, scale=1))
        traced = run.trace(q, keys, before, sinks, tokens)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("mosaic_gpu" in text) == ("H100" in name)


@pytest.mark.parametrize("kernel", ["mosaic_tpu", "mosaic_gpu"])
def test_the_kernel_compiles_in_programs_with_64_bits(kernel):
    """Their integers have as many, kernels' have not."""
    made = Attend(kernel).made(3, 4)
    tokens, q, keys, before, sinks, entries, _, limits = made
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.int64(x)), (tokens, limits))
        which = Entries(Table(entries[None]), limits_T=wide[1])
        operands = (q, keys, before, sinks, wide[0], which)
        run = partial(sparse_attention, scale=1, implementation=kernel)
        assert jax.eval_shape(run, *operands).dtype == q.dtype


def test_entries_need_to_be_named():
    tokens, q, keys, before, sinks, entries, chosen, limits = Attend("xla").made(2, 1)
    for both in ({}, {"limits_T": limits, "chosen_TX": chosen}):
        which = Entries(Table(entries[None]), **both)
        with pytest.raises(ValueError, match="either"):
            sparse_attention(q, keys, before, sinks, tokens, which, scale=1)


def test_index_scores_do_not_depend_on_how_keys_are_cut(monkeypatch):
    attend = Attend("xla")
    _, H, _, C, _ = attend.sizes
    tokens = attend.made(4, 1)[0]
    random, T = np.random.default_rng(0), len(tokens.slots_T)
    q, w = random.normal(size=(T, 4, H)), random.normal(size=(T, 4))
    k = np.asarray(random.normal(size=(3, C, H)), np.float32)
    q, w = (jnp.asarray(x, jnp.float32) for x in (q, w))
    whole = index_scores(q, Table(k[None]), w, tokens)
    *_, paged = attend.tables(k, apart=False)
    agrees(tokens, index_scores(q, paged, w, tokens), np.asarray(whole))
    monkeypatch.setattr(index_ref, "CHUNK", 5)
    np.testing.assert_allclose(
        index_scores(q, Table(k[None]), w, tokens), whole, atol=1e-5
    )
