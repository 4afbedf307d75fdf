"""indexer_topk: what the queries of a group choose, as plain loops would choose it.

Operands are small integers, so scores are exact and often equal.
"""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import Index, Ragged, Table, indexer_topk
from pallas_kernels.indexer_topk import mosaic_tpu, selection
from pallas_kernels.indexer_topk.api import IMPLEMENTATIONS

HEADS, WIDTH, LAYERS, PAGE = 8, 128, 2, 32
KEYS = 320  # not a multiple of a chunk


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "TILE", 128)


def choose(index, limits, tokens, implementation):
    simulated = pltpu.force_tpu_interpret_mode(
        pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    )
    with simulated if implementation == "mosaic_tpu" else nullcontext():
        run = jax.jit(indexer_topk, static_argnames="implementation")
        return jax.device_get(run(index, limits, tokens, implementation=implementation))


def case(counts, picks, values, dtype=jnp.float32, paged=False, seed=0):
    """An index over random keys, and all scores in float64."""
    random = np.random.default_rng(seed)
    counts = np.array(counts)
    T, B = counts.sum() + 3, len(counts)
    slots = np.full(T, -1)
    offsets = np.cumsum([0, *counts[:-1]]) + (np.arange(B) > 0)  # padding in between
    for slot, (offset, count) in enumerate(zip(offsets, counts, strict=True)):
        slots[offset : offset + count] = slot
    tokens = Ragged(
        slots_T=jnp.asarray(slots),
        starts_B=jnp.zeros(B, jnp.int32),
        offsets_B=jnp.asarray(offsets),
        counts_B=jnp.asarray(counts),
        rows=int(counts.max()),
    )
    q = random.integers(-values, values + 1, (T, HEADS, WIDTH))
    w = random.integers(-2, 3, (T, HEADS))
    keys = random.integers(-values, values + 1, (B, KEYS, WIDTH))
    scores = np.zeros((T, KEYS))
    for t in np.flatnonzero(slots >= 0):
        scores[t] = w[t] @ np.maximum(q[t] @ keys[slots[t]].T, 0)
    rows = np.full((LAYERS, B, KEYS, WIDTH), np.nan)
    rows[1] = keys
    pages = None
    if paged:
        order = random.permutation(B * KEYS // PAGE)
        apart = np.full((LAYERS, len(order), PAGE, WIDTH), np.nan)
        apart[1, order] = keys.reshape(-1, PAGE, WIDTH)
        rows, pages = apart, jnp.asarray(order.reshape(B, -1))
    index = Index(
        q_TNH=jnp.asarray(q, dtype),
        weights_TN=jnp.asarray(w, jnp.float32),
        keys=Table(jnp.asarray(rows, dtype), jnp.int32(1), pages),
        picks=picks,
    )
    return index, tokens, scores


def plain(scores, limits, tokens, picks):
    """Per group: entry -> which of its queries chose it."""
    groups = {}
    for t in np.flatnonzero(np.asarray(tokens.slots_T) >= 0):
        slot, row = int(tokens.slots_T[t]), int(tokens.rows_T[t])
        blocks = -(-tokens.rows // tokens.group)
        entries = groups.setdefault(slot * blocks + row // tokens.group, {})
        order = np.argsort(-scores[t, : limits[t]], kind="stable")[:picks]
        for entry in order:
            entries[entry] = entries.get(entry, 0) | 1 << row % tokens.group
    return groups


def agrees(united, expected):
    for group, used in enumerate(united.used_G):
        rows, members = united.rows_G1n[group, 0], united.members_G1n[group, 0]
        entries = dict(zip(rows[:used].tolist(), members[:used].tolist(), strict=True))
        assert entries == expected.get(group, {}), group
        assert len(entries) == used
        assert not rows[used:].any() and not members[used:].any()


LIMITS = [0, 1, 39, 40, 41, 127, 128, 129, 200, KEYS - 1, KEYS]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("values", [1, 40])
def test_groups_choose_what_their_queries_do(name, values):
    """Scores of small values are often equal; limits lie around every boundary."""
    index, tokens, scores = case((6, 0, 5), 40, values)
    limits = np.zeros(len(scores), int)
    limits[np.flatnonzero(np.asarray(tokens.slots_T) >= 0)] = LIMITS
    united = choose(index, jnp.asarray(limits), tokens, name)
    agrees(united, plain(scores, limits, tokens, 40))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("picks", [1, 130, 2 * KEYS])
def test_slots_of_several_groups_read_pages_in_any_order(name, picks):
    index, tokens, scores = case((19, 3), picks, 3, dtype=jnp.bfloat16, paged=True)
    limits = np.random.default_rng(1).integers(0, KEYS + 1, len(scores))
    united = choose(index, jnp.asarray(limits), tokens, name)
    agrees(united, plain(scores, limits, tokens, picks))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_keys_that_no_query_sees_may_be_anything(name):
    index, tokens, scores = case((2, 2), 16, 3)
    rows = index.keys.rows_LBCH
    limits = np.full(len(scores), 130)
    keys = Table(rows.at[:, :, 130:].set(jnp.nan), index.keys.layer)
    index = Index(q_TNH=index.q_TNH, weights_TN=index.weights_TN, keys=keys, picks=16)
    agrees(
        choose(index, jnp.asarray(limits), tokens, name),
        plain(scores, limits, tokens, 16),
    )


def test_scores_of_any_size_are_ordered():
    """Infinities, both zeros and numbers of all sizes; more registers than one part."""
    random = np.random.default_rng(0)
    registers, picks = 144, 600
    scores = random.normal(size=(8, registers * 128)).astype(np.float32)
    scores *= 10.0 ** random.integers(-30, 30, size=scores.shape)
    scores[0] = random.choice([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf], len(scores[0]))
    scores[1] = -0.0
    limits = [len(scores[0]), 700, 599, 600, 601, 0, 18_000, 17_919]
    shapes = [jax.ShapeDtypeStruct((1, 1, 40 * 128), jnp.int32)] * 2
    shapes += [jax.ShapeDtypeStruct((1, 1, 1), jnp.int32)]
    padded = 256

    def kernel(score_ref, rows_ref, members_ref, used_ref, *scratch):
        selection.select(
            score_ref,
            selection.Scratch(*scratch),
            (rows_ref, members_ref, used_ref),
            limits=limits,
            picks=picks,
            registers=registers,
            together=16,
        )

    tiles = scores.reshape(8, registers, 128).swapaxes(0, 1)
    tiles = np.pad(tiles, ((0, padded - registers), (0, 0), (0, 0)))
    with pltpu.force_tpu_interpret_mode(
        pltpu.InterpretParams(uninitialized_memory="nan")
    ):
        rows, members, used = pl.pallas_call(
            kernel,
            out_shape=shapes,
            out_specs=[
                pl.BlockSpec(),
                pl.BlockSpec(),
                pl.BlockSpec(memory_space=pltpu.SMEM),
            ],
            scratch_shapes=[
                pltpu.VMEM((padded, 8, 128), jnp.int32),
                *[pltpu.VMEM((padded, 128), jnp.float32)] * 4,
            ],
        )(jnp.asarray(tiles))
    expected = {}
    for row, limit in enumerate(limits):
        for entry in np.argsort(-(scores[row, :limit] + 0.0), kind="stable")[:picks]:
            expected[entry] = expected.get(entry, 0) | 1 << row
    used = int(used[0, 0, 0])
    found = dict(
        zip(
            np.asarray(rows).ravel()[:used].tolist(),
            np.asarray(members).ravel()[:used].tolist(),
            strict=True,
        )
    )
    assert found == expected


def test_operands_that_the_kernel_does_not_take_are_refused_by_name():
    index, tokens, scores = case((2,), 4, 3)
    limits = jnp.zeros(len(scores), jnp.int32)
    narrow = Index(
        q_TNH=index.q_TNH[..., :64],
        weights_TN=index.weights_TN,
        keys=Table(index.keys.rows_LBCH[..., :64]),
        picks=4,
    )
    with pytest.raises(ValueError, match="mosaic_tpu needs heads .* got 8 x 64"):
        indexer_topk(narrow, limits, tokens, implementation="mosaic_tpu")
    odd = Index(
        q_TNH=index.q_TNH,
        weights_TN=index.weights_TN,
        keys=Table(index.keys.rows_LBCH[:, :, :12]),
        picks=4,
    )
    with pytest.raises(ValueError, match="reads keys by 8, got 12"):
        indexer_topk(odd, limits, tokens, implementation="mosaic_tpu")
