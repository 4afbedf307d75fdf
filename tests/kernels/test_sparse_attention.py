"""sparse_attention: one softmax over recent rows, entries and a sink."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspark.models import FlatTokens
from pallas_kernels import Entries, Table, index_scores, sparse_attention
from pallas_kernels.index_scores import ref as index_ref

N, H, WINDOW, C, PAGE = 3, 8, 4, 12, 4
STARTS = np.array([0, 2, 9])
run = jax.jit(sparse_attention, static_argnames=("scale", "causal"))


def made(rows, picks, seed=0):
    """Ragged tokens of three slots, their recent rows, entries and choices."""
    random = np.random.default_rng(seed)
    counts = np.array([rows, 0, max(rows - 2, 1)])
    tokens = FlatTokens.from_rows(
        jnp.zeros((3, rows), jnp.int32), jnp.asarray(STARTS), jnp.asarray(counts),
        capacity=int(counts.sum()) + 2,
    )  # fmt: skip
    T = len(tokens.slots_T)
    q, keys = random.normal(size=(T, N, H)), random.normal(size=(T, H))
    before = random.normal(size=(3, WINDOW - 1, H))
    entries, sinks = random.normal(size=(3, C, H)), random.normal(size=N)
    order = random.permuted(np.tile(np.arange(C), (T, 1)), axis=-1)
    chosen = np.where(random.random((T, picks)) < 0.3, -1, order[:, :picks])
    limits = random.integers(0, C + 1, T)
    arrays = (np.asarray(x, np.float32) for x in (q, keys, before, sinks, entries))
    return tokens, *map(jnp.asarray, (*arrays, chosen, limits))


def plain(tokens, q, keys, before, sinks, entries=None, seen_TC=None, *, causal=True):
    """The equation, one query and head after the other, in float64."""
    out = np.zeros(q.shape)
    slots = np.asarray(tokens.slots_T)
    for t, n in np.ndindex(q.shape[:2]):
        if (slot := slots[t]) < 0:
            continue
        own = np.flatnonzero(slots == slot)
        row = int(np.flatnonzero(own == t)[0])
        real = before[slot][max(len(before[slot]) - STARTS[slot], 0) :]
        rows = np.concatenate([real, keys[own[: row + 1]] if causal else keys[own]])
        if causal:
            rows = rows[-(before.shape[1] + 1) :]
        if entries is not None:
            rows = np.concatenate([rows, entries[slot][seen_TC[t]]])
        weights = np.exp(0.3 * rows.astype(np.float64) @ q[t, n])
        out[t, n] = weights @ rows / (weights.sum() + np.exp(sinks[n]))
    return out


def agrees(tokens, mine, expected):
    real = np.asarray(tokens.slots_T) >= 0
    np.testing.assert_allclose(np.asarray(mine)[real], expected[real], atol=3e-6)


def paged(entries):
    """The same entries, their pages in another order."""
    pages = np.random.default_rng(3).permutation(3 * C // PAGE).reshape(3, -1)
    rows = np.zeros((3 * C // PAGE, PAGE, H), np.float32)
    rows[pages] = entries.reshape(3, -1, PAGE, H)
    return rows, jnp.asarray(pages)


@pytest.mark.parametrize(
    ("rows", "picks"), [(1, 1), (3, 5), (4, 1), (5, 5), (11, 1), (11, 5)]
)
def test_chosen_entries(rows, picks):
    """Few choices are gathered, many are masked; long passes go block by block."""
    tokens, q, keys, before, sinks, entries, chosen, _ = made(rows, picks)
    seen = np.zeros((len(q), C), bool)
    for t in range(len(q)):
        seen[t, chosen[t][chosen[t] >= 0]] = True
    expected = plain(tokens, q, keys, before, sinks, entries, seen)
    pages, table = paged(entries)
    for mine in (
        Table(np.stack([entries + 1, entries]), 1),
        Table(np.stack([pages + 1, pages]), 1, table),
    ):
        which = Entries(mine, chosen_TX=chosen)
        agrees(tokens, run(q, keys, before, sinks, tokens, which, scale=0.3), expected)


@pytest.mark.parametrize("rows", [1, 4, 11])
def test_entries_below_a_limit(rows):
    tokens, q, keys, before, sinks, entries, _, limits = made(rows, 1)
    seen = np.arange(C) < limits[:, None]
    expected = plain(tokens, q, keys, before, sinks, entries, seen)
    pages, table = paged(entries)
    for mine in (Table(entries[None]), Table(pages[None], 0, table)):
        which = Entries(mine, limits_T=limits)
        seen = run(q, keys, before, sinks, tokens, which, scale=0.3)
        agrees(tokens, seen, expected)


@pytest.mark.parametrize("rows", [1, 5, 11])
def test_a_block_sees_all_of_itself(rows):
    tokens, q, keys, before, sinks, *_ = made(rows, 1)
    seen = run(q, keys, before, sinks, tokens, scale=0.3, causal=False)
    agrees(tokens, seen, plain(tokens, q, keys, before, sinks, causal=False))


def test_entries_need_to_be_named():
    tokens, q, keys, before, sinks, entries, chosen, limits = made(2, 1)
    for both in ({}, {"limits_T": limits, "chosen_TX": chosen}):
        which = Entries(Table(entries[None]), **both)
        with pytest.raises(ValueError, match="either"):
            sparse_attention(q, keys, before, sinks, tokens, which, scale=1)


def test_index_scores_do_not_depend_on_how_keys_are_cut(monkeypatch):
    tokens = made(4, 1)[0]
    random, T = np.random.default_rng(0), len(tokens.slots_T)
    q, w = random.normal(size=(T, 4, H)), random.normal(size=(T, 4))
    k = np.asarray(random.normal(size=(3, C, H)), np.float32)
    q, w = (jnp.asarray(x, jnp.float32) for x in (q, w))
    whole = index_scores(q, Table(k[None]), w, tokens)
    pages, table = paged(k)
    seen = index_scores(q, Table(pages[None], 0, table), w, tokens)
    agrees(tokens, seen, np.asarray(whole))
    monkeypatch.setattr(index_ref, "CHUNK", 5)
    np.testing.assert_allclose(
        index_scores(q, Table(k[None]), w, tokens), whole, atol=1e-5
    )
