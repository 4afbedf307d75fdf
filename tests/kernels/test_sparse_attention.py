"""sparse_attention: one softmax over recent rows, entries and a sink."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import index_scores, sparse_attention
from pallas_kernels.index_scores import ref as index_ref

B, N, H, WINDOW, C = 2, 3, 8, 4, 12


def made(rows, picks, seed=0):
    """Queries `rows` long, their recent rows, entries, and choices of `picks`."""
    random = np.random.default_rng(seed)
    q, recent = (
        random.normal(size=(B, rows, N, H)),
        random.normal(size=(B, WINDOW - 1 + rows, H)),
    )
    entries, sinks = random.normal(size=(B, C, H)), random.normal(size=N)
    order = random.permuted(np.tile(np.arange(C), (B, rows, 1)), axis=-1)
    chosen = np.where(random.random((B, rows, picks)) < 0.3, -1, order[..., :picks])
    limits = random.integers(0, C + 1, (B, rows))
    first = np.arange(rows) + random.integers(0, WINDOW, (B, rows))
    spans = np.stack([first, np.tile(np.arange(rows) + WINDOW, (B, 1))], axis=-1)
    single = (np.asarray(x, np.float32) for x in (q, recent, entries, sinks))
    return (*single, spans, chosen, limits)


def plain(q, recent, entries, sinks, spans, seen):
    """The equation, one query and head after the other, in float64."""
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        rows = [*recent[b, spans[b, t, 0] : spans[b, t, 1]], *entries[b][seen[b, t]]]
        rows = np.array(rows, np.float64).reshape(-1, H)
        weights = np.exp(0.3 * rows @ q[b, t, n])
        out[b, t, n] = weights @ rows / (weights.sum() + np.exp(sinks[n]))
    return out


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 11])
@pytest.mark.parametrize("picks", [1, 5])
def test_chosen_entries(rows, picks):
    """Few choices are gathered, many are masked; long passes go block by block."""
    q, recent, entries, sinks, spans, chosen, _ = made(rows, picks)
    seen = np.zeros((B, rows, C), bool)
    for b, t in np.ndindex(B, rows):
        seen[b, t, chosen[b, t][chosen[b, t] >= 0]] = True
    mine = jax.jit(sparse_attention, static_argnames=("window", "scale"))(
        q,
        recent,
        spans,
        sinks,
        np.stack([entries + 1, entries]),
        layer=1,
        chosen_BQX=chosen,
        window=WINDOW,
        scale=0.3,
    )
    expected = plain(q, recent, entries, sinks, spans, seen)
    np.testing.assert_allclose(mine, expected, atol=2e-6)


@pytest.mark.parametrize("rows", [1, 4, 11])
def test_entries_below_a_limit(rows):
    q, recent, entries, sinks, spans, _, limits = made(rows, 1)
    seen = np.arange(C) < limits[..., None]
    mine = sparse_attention(
        q,
        recent,
        spans,
        sinks,
        entries[None],
        limits_BQ=limits,
        window=WINDOW,
        scale=0.3,
    )
    expected = plain(q, recent, entries, sinks, spans, seen)
    np.testing.assert_allclose(mine, expected, atol=2e-6)


def test_entries_need_to_be_named():
    q, recent, entries, sinks, spans, chosen, limits = made(2, 1)
    for both in ({}, {"limits_BQ": limits, "chosen_BQX": chosen}):
        with pytest.raises(ValueError, match="either"):
            sparse_attention(
                q, recent, spans, sinks, entries[None], **both, window=WINDOW, scale=1
            )


def test_index_scores_do_not_depend_on_how_they_are_cut(monkeypatch):
    random = np.random.default_rng(0)
    q, k = random.normal(size=(B, 3, 4, H)), random.normal(size=(B, 50, H))
    w = random.normal(size=(B, 3, 4))
    q, k, w = (jnp.asarray(x, jnp.float32) for x in (q, k, w))
    whole = index_scores(q, k, w)
    monkeypatch.setattr(index_ref, "CHUNK", 16)
    np.testing.assert_allclose(index_scores(q, k, w), whole, atol=1e-5)
