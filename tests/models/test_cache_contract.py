"""The contract of position-indexed caches and flat tokens, for every target.

What a slot says depends on its own tokens and positions only: not on how they were cut
into passes, what stood in the cache before, which slot it is, who shares the pass, or
how much padding the pass carries.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspark import models
from jaxspark.configs.targets import deepseek_v4_tiny
from jaxspark.models import (
    DeepSeekV4,
    DenseConfig,
    DenseDecoder,
    FlatTokens,
    RopeConfig,
)
from tests.driver import Session, forward

# Most passes have one shape, so that most tests share one program.
SLOTS, LENGTH, CHUNK = 4, 40, 8
TOLERANCE = 1e-3  # float32 rounding: 1.5e-4 at worst in 700 seeds, logits up to 20
TINY = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
TARGETS = {
    "llama": DenseConfig(**TINY),
    "qwen3": DenseConfig(
        **TINY | {"head_dim": 12},
        qk_norm=True,
        attention_bias=True,
        tie_word_embeddings=True,
        rope=RopeConfig(
            rope_type="yarn", factor=4.0, original_max_position_embeddings=16
        ),
    ),
}


def small_v4():
    """Windows of 6, entries of 4 and 8: all of them end within these short texts."""
    config = replace(
        deepseek_v4_tiny(TINY["vocab_size"]),
        sliding_window=6,
        hca_ratio=8,
        index_topk=2,
        hc_sinkhorn_iters=3,
        compress_ratios=(4, 8),
    )
    model = DeepSeekV4(config, rngs=nnx.Rngs(1))
    model.embed_tokens.weight[...] *= 30.0
    return model


def small_dense(name):
    model = DenseDecoder(TARGETS[name], rngs=nnx.Rngs(1))
    graphdef, params = nnx.split(model)
    params = jax.tree.map(lambda w: 2.0 * w, params)
    model = nnx.merge(graphdef, params)
    model.embed_tokens.weight[...] *= 10.0
    return model


@pytest.fixture(params=[*TARGETS, "deepseek_v4"], scope="module")
def model(request):
    """A tiny target whose logits depend visibly on every earlier token."""
    v4 = request.param == "deepseek_v4"
    return small_v4() if v4 else small_dense(request.param)


@pytest.fixture(params=TARGETS, scope="module")
def dense(request):
    """The same, with attention to all positions and caches of keys and values."""
    return small_dense(request.param)


def some_tokens(random, *lengths):
    return [random.integers(0, TINY["vocab_size"], n) for n in lengths]


def session(model, **options):
    return Session(model, SLOTS, LENGTH, **options)


def feed(session, rows, *, chunk=CHUNK, **options):
    """Logits of the new tokens of the first slots; the others get none."""
    idle = [[]] * (SLOTS - len(rows))
    return session.feed([*rows, *idle], chunk=chunk, **options)[0][: len(rows)]


def assert_same(ours, expected, tolerance=TOLERANCE):
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.shape == theirs.shape
        worst = np.abs(mine - theirs).max(initial=0.0)
        assert worst <= tolerance


def test_earlier_tokens_matter(model, random):
    """The other tests would pass on a model that ignores its cache; this one not."""
    (row,) = some_tokens(random, 12)
    other = row.copy()
    other[0] = (other[0] + 1) % TINY["vocab_size"]
    logits = feed(session(model), [row, other])
    assert np.abs(logits[0][-1] - logits[1][-1]).max() > 100 * TOLERANCE


def test_rewind_equals_never_having_seen(model, random):
    for _ in range(4):
        a, b, c = random.integers(0, 13, (3, 3))
        a, c = np.maximum(a, 1), np.maximum(c, 1)
        kept, dropped, new = (some_tokens(random, *n) for n in (a, b, c))
        rewound, straight = session(model), session(model)
        feed(rewound, [np.concatenate(pair) for pair in zip(kept, dropped)])
        rewound.rewind([*a, 0])
        feed(straight, kept)
        assert_same(feed(rewound, new), feed(straight, new))


def test_rewind_to_nothing_frees_a_slot(model, random):
    (old, new, neighbour) = some_tokens(random, 20, 8, 30)
    reused = session(model)
    feed(reused, [old, neighbour[:20]])
    reused.rewind([0, 20, 0, 0])
    logits = feed(reused, [new, neighbour[20:]])
    assert_same(logits[:1], feed(session(model), [new]))


def test_garbage_beyond_the_length_is_never_read(model, random):
    rows = some_tokens(random, 19, 3)
    clean, dirty = session(model), session(model)
    dirty.cache = jax.tree.map(
        lambda x: jnp.asarray(1e4 * random.standard_normal(x.shape), x.dtype),
        dirty.cache,
    )
    assert_same(feed(dirty, rows), feed(clean, rows))


def test_slots_are_interchangeable(model, random):
    rows = some_tokens(random, 14, 1, 8, 5)
    order = random.permutation(4)
    straight = feed(session(model), rows)
    permuted = feed(session(model), [rows[i] for i in order])
    assert_same(permuted, [straight[i] for i in order])


def test_a_slot_does_not_see_its_neighbours(model, random):
    rows = some_tokens(random, 11, 11, 11)
    together = feed(session(model), rows)
    for slot, row in enumerate(rows):
        alone = [row if other == slot else [] for other in range(3)]
        assert_same([together[slot]], [feed(session(model), alone)[slot]])


@pytest.mark.parametrize("chunk", (1, None))
def test_passes_may_be_cut_anywhere(model, random, chunk):
    rows = some_tokens(random, 19, 7)
    seen = feed(session(model), rows, chunk=chunk)
    assert_same(seen, feed(session(model), rows))


def test_bucket_size_does_not_matter(model, random):
    """13 tokens in a bucket of as many; else in one of 32, the rest padding."""
    rows = some_tokens(random, 8, 0, 5)
    seen = feed(session(model), rows, capacity=13)
    assert_same(seen, feed(session(model), rows))


def test_ids_of_padding_do_not_matter(model, random):
    ids_BQ = random.integers(0, 53, (SLOTS, CHUNK))
    counts_B, starts_B = np.array([3, 2, 0, 8]), np.zeros(SLOTS, np.int32)
    results = []
    for fill in (0, 52):
        ids_BQ[np.arange(CHUNK) >= counts_B[:, None]] = fill
        fresh = session(model)
        results.append(
            forward(
                fresh.graphdef, fresh.params, fresh.cache, ids_BQ, starts_B, counts_B
            )
        )
    for first, second in zip(*map(jax.tree.leaves, results)):
        assert (np.asarray(first) == np.asarray(second)).all()


def test_padding_writes_nothing(dense, random):
    written = session(dense)
    feed(written, some_tokens(random, 3, 1))
    for layer in written.cache:
        for rows_BKSH in (layer.k_BKSH, layer.v_BKSH):
            written_BS = np.abs(np.asarray(rows_BKSH)).sum((1, 3)) > 0
            assert written_BS.sum(axis=1).tolist() == [3, 1, 0, 0]
            assert written_BS[0, :3].all() and written_BS[1, 0]


def test_tokens_past_the_cache_are_dropped_and_hurt_nobody(model, random):
    """A slot that runs over its cache's end must not write into its neighbour."""
    long, row = some_tokens(random, LENGTH + 4, 6)
    beside, alone = session(model), session(model)
    # The last of these passes begins inside the cache and ends outside.
    for rows in ([long[:3], row[:3]], [long[3:], []]):
        feed(beside, rows)
    feed(alone, [[], row[:3]])
    assert_same(*(feed(each, [[], row[3:]])[1:] for each in (beside, alone)))


def test_heads_stored_in_128_lanes_give_the_same(dense, random, monkeypatch):
    """As they are for TPUs."""
    rows, narrow = some_tokens(random, 15, 4), session(dense)
    monkeypatch.setattr(models.cache, "lanes", lambda: 128)
    wide = session(dense)
    assert wide.cache[0].k_BKSH.shape[-1] == 128
    assert_same(feed(wide, rows), feed(narrow, rows))


def test_taps_come_in_the_order_asked_and_end_in_the_logits(dense, random):
    (row,) = some_tokens(random, 10)
    logits, taps = Session(dense, 1, 16, taps=(1, -1, 0)).feed([row])
    ordered = Session(dense, 1, 16, taps=(-1, 0, 1)).feed([row])[1][0]
    assert_same(taps, [ordered[[2, 0, 1]]], 0.0)
    table_VD = np.asarray(dense.embed_tokens.weight[...])
    assert_same([ordered[0]], [table_VD[row]], 0.0)
    assert_same([np.asarray(dense.logits(jnp.asarray(ordered[2])))], logits)


def test_a_limit_opens_the_block_to_itself(dense, random):
    """Rows that share a limit see each other: the last one's id reaches the first."""
    graphdef, params = nnx.split(dense)

    @jax.jit
    def first_row(params, ids_BQ, limits_B):
        model = nnx.merge(graphdef, params)
        starts_B, counts_B = jnp.zeros(1, jnp.int32), jnp.full(1, 5)
        tokens = FlatTokens.from_rows(ids_BQ, starts_B, counts_B, limits_B=limits_B)
        x_TD, _, _ = model(tokens, model.init_cache(1, 8))
        return x_TD[0]

    ids_BQ = random.integers(0, 52, (1, 5))
    changed_BQ = ids_BQ + np.array([0, 0, 0, 0, 1])
    for limit, seen in ((5, True), (4, False)):
        limits_B = jnp.array([limit])
        a_D, b_D = (first_row(params, ids, limits_B) for ids in (ids_BQ, changed_BQ))
        assert (np.abs(np.asarray(a_D - b_D)).max() > 1e-4) == seen
