"""Pages: where a slot's cache rows lie changes nothing, and others' are never written.

Every target and drafter decodes with shuffled pages what it decodes without; pages that
a slot does not own keep every bit.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspark.decoding import (
    Admission,
    DecodeOptions,
    DecodeState,
    Sampling,
    admit,
    decode,
    prefill,
)
from jaxspark.exactness.tiny_models import tiny_models
from jaxspark.models.base import is_table
from jaxspark.models.pages import PAGE, rings, with_rings
from tests import zoo

SLOTS, CAPACITY, NEW, CHUNK, BLOCK, PAGES = 3, 512, 24, 64, 4, 16
CASES = [
    ("dense", "hybrid-asks"),
    ("dense", "eagle3"),
    ("deepseek_v4", "deepseek_v4_dspark"),
    ("deepseek_v4", "mtp"),
]
# The first ends on a page's border, the second begins another page in its output.
PROMPTS = zoo.prompts(257, 120, 9, seed=3)


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def pair(request):
    family, name = request.param
    target, drafters = tiny_models(
        family, zoo.VOCAB, drafters=[name], block_length=BLOCK
    )
    return target, drafters[name]


def admitted(pair, pages=None):
    state = DecodeState.empty(
        *pair, slots=SLOTS, capacity=CAPACITY, block_length=BLOCK, pages=pages
    )
    limits = [len(prompt) + NEW for prompt in PROMPTS]
    sampling = Sampling.of(3, temperature=[0.0, 1.0, 0.7], seed=[1, 2, 3])
    admission = Admission.of(state, PROMPTS, limits, sampling)
    return admit(state, jnp.arange(3), admission)


def with_pages(state, table):
    return replace(state, pages_BP=jnp.asarray(table, jnp.int32))


def shuffled():
    """Pages for 3, 2 and 1 times 128 positions, in no order; the rest have none."""
    table = np.zeros((SLOTS, CAPACITY // PAGE), np.int32)
    table[0, :3], table[1, :2], table[2, :1] = [7, 2, 11], [3, 14], [9]
    return table


def read(pair, state, chunks=2**30):
    return prefill(*pair, state, jnp.int32(chunks), chunk=CHUNK, together=2)


def finished(pair, state):
    while (np.asarray(state.phase_B) == 1).any():
        state = read(pair, state)
    options = DecodeOptions(block_length=BLOCK, coupling="gumbel").resolve(
        pair[1], SLOTS
    )
    return decode(*pair, state, jnp.int32(100), options=options)


def outputs(state):
    tokens, lengths = np.asarray(state.tokens_BS), np.asarray(state.lengths_B)
    return [tokens[slot, :n].tolist() for slot, n in enumerate(lengths)]


def pools(state):
    tables = jax.tree.leaves((state.target_cache, state.draft_cache), is_leaf=is_table)
    return [node for node in tables if is_table(node) and node.grows]


def of_page(state, page):
    """Every row of a page, of all tables."""
    return [
        np.asarray(leaf[:, page] if leaf.shape[1] == PAGES else leaf[page])
        for node in pools(state)
        for leaf in jax.tree.leaves(node)
    ]


def assert_equal(rows, others):
    for one, other in zip(rows, others, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.long
def test_tokens_do_not_depend_on_where_rows_lie(pair):
    expected = outputs(finished(pair, admitted(pair)))
    state = finished(pair, with_pages(admitted(pair, PAGES), shuffled()))
    assert outputs(state) == expected
    for page in set(range(PAGES)) - set(shuffled().ravel()) | {0}:
        assert not any(rows.any() for rows in of_page(state, page))


def test_a_shared_page_is_read_and_never_written(pair):
    """The second request begins as the first; it is said to be read up to there."""
    state = with_pages(admitted(pair, PAGES), shuffled())
    state = read(pair, state, PAGE // CHUNK)
    assert int(state.processed_B[0]) == PAGE
    caches = state.target_cache, state.draft_cache
    taken = [node.at_slots(jnp.array([0])) for node in rings(caches)]
    state = finished(pair, state)
    expected = outputs(state)[0]
    before = of_page(state, 7)
    assert any(rows.any() for rows in before)
    again = admitted(pair, PAGES)
    caches = state.target_cache, state.draft_cache
    # Another slot takes the first one's place in everything but its first page, and a
    # third goes on from there with another token.
    table = np.zeros_like(shuffled())
    table[1, :3], table[2, :3] = [-7, 5, 6], [-7, 8, 10]
    parted = PROMPTS[0].copy()
    parted[PAGE] = (parted[PAGE] + 1) % zoo.VOCAB
    admission = Admission.of(
        again,
        [PROMPTS[0], parted],
        [len(parted) + NEW] * 2,
        Sampling.of(2, temperature=0.0, seed=1),
        processed=[PAGE] * 2,
    )
    target_cache, draft_cache = with_rings(
        caches,
        [
            node.with_slots(jnp.array([2]), rows).with_slots(jnp.array([1]), rows)
            for node, rows in zip(rings(caches), taken)
        ],
    )
    again = replace(
        with_pages(again, table), target_cache=target_cache, draft_cache=draft_cache
    )
    again = finished(pair, admit(again, jnp.array([1, 2]), admission))
    assert outputs(again)[1] == expected
    assert_equal(of_page(again, 7), before)


def test_positions_without_a_page_are_not_written(pair):
    """A slot that runs past its pages spoils nothing of its neighbours."""
    table = shuffled()
    alone = finished(pair, with_pages(admitted(pair, PAGES), table))
    table[0, 1:] = 0
    state = finished(pair, with_pages(admitted(pair, PAGES), table))
    assert outputs(state)[1:] == outputs(alone)[1:]
    for page in (3, 14, 9):
        assert_equal(of_page(state, page), of_page(alone, page))
