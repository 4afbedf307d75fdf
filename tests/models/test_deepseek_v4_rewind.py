"""DeepSeek-V4 needs no undo: 500 random rewinds around every boundary."""

from copy import copy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspark.configs.targets import deepseek_v4_tiny
from jaxspark.models import DeepSeekV4
from tests.driver import Session

VOCAB, SLOTS, ROUNDS, BLOCK, TOLERANCE = 61, 20, 25, 8, 1e-3


@pytest.fixture(scope="module")
def model():
    """A tiny target whose logits depend visibly on every layer kind."""
    config = replace(
        deepseek_v4_tiny(VOCAB), compress_ratios=(0, 4, 32, 4, 32), hc_sinkhorn_iters=3
    )
    model = DeepSeekV4(config, rngs=nnx.Rngs(2))
    model.embed_tokens.weight[...] *= 30.0
    return model


def feed(session, rows):
    """Logits of the new tokens; prompts and blocks share two programs."""
    longest = max(map(len, rows))
    return session.feed(rows, chunk=32 if longest > BLOCK else BLOCK)[0]


@pytest.mark.long
def test_rewind_equals_never_having_seen(model, random):
    """A + B, rewound to A, then C, is A + C; 20 requests at a time, 500 in all.

    Lengths of A lie within a block of the ends of windows (16), of entries (4, 32), of
    what the indexer chooses from (8 entries) and of blocks.
    """
    config = model.config
    ends = [config.sliding_window, 4, 32, 64, 96, 128, 4 * config.index_topk, BLOCK]
    worst = 0.0
    for _ in range(ROUNDS):
        length = random.choice(ends, SLOTS) + random.integers(-BLOCK, BLOCK + 1, SLOTS)
        kept = [random.integers(0, VOCAB, max(n, 1)) for n in length]
        drafts = [random.integers(0, VOCAB, n) for n in random.integers(1, 9, SLOTS)]
        new = [random.integers(0, VOCAB, n) for n in random.integers(1, 9, SLOTS)]
        session = Session(model, SLOTS, 160)
        feed(session, kept)
        straight = copy(session)
        straight.cache = jax.tree.map(jnp.copy, session.cache)
        dirty = feed(session, drafts)
        session.rewind([len(row) for row in kept])
        seen, expected = feed(session, new), feed(straight, new)
        assert any(np.abs(a[0] - b[0]).max() > 0.1 for a, b in zip(dirty, expected)), (
            "drafts that say what the answer says prove nothing"
        )
        for slot, (mine, theirs) in enumerate(zip(seen, expected, strict=True)):
            far = np.abs(mine - theirs).max()
            worst = max(worst, far)
            assert far <= TOLERANCE, (slot, len(kept[slot]))
    print(f"largest difference {worst:.1e}")


@pytest.mark.long
def test_a_long_pass_forgets_what_no_query_sees(model, random):
    """Passes longer than the rings write their newest rows only."""
    rows = [random.integers(0, VOCAB, 150), random.integers(0, VOCAB, 140)]
    rows += [[]] * (SLOTS - len(rows))
    whole, parts = Session(model, SLOTS, 160), Session(model, SLOTS, 160)
    first = whole.feed([row[:-3] for row in rows])[0]
    second = parts.feed([row[:-3] for row in rows], chunk=BLOCK)[0]
    for mine, theirs in zip(first, second, strict=True):
        assert np.abs(mine - theirs).max(initial=0) <= TOLERANCE
    ends = [row[-3:] for row in rows]
    last = (each.feed(ends, chunk=BLOCK)[0] for each in (whole, parts))
    for mine, theirs in zip(*last, strict=True):
        assert np.abs(mine - theirs).max(initial=0) <= TOLERANCE
