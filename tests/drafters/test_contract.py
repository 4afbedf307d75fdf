"""What every drafter promises: context by position, slots apart, clear errors."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspark.configs import drafters as draft_configs
from jaxspark.drafters import DraftContext, DSparkConfig
from jaxspark.drafters.eagle3 import Eagle3Cache
from jaxspark.models import FlatTokens
from tests import zoo
from tests.driver import Sampler, greedy_draw

# Of every pass, so that tests share two programs for each drafter.
SLOTS, ROWS, LENGTH = 3, 12, 48


@pytest.fixture(scope="module", params=zoo.NEURAL)
def case(request):
    """A target, a drafter, and jitted observe and propose."""
    model = zoo.target()
    drafter = zoo.drafter(request.param, model)

    @jax.jit
    def observe(cache, taps_BmSD, starts_B, counts_B):
        slots, rows = taps_BmSD.shape[0], taps_BmSD.shape[2]
        ids_BQ = jnp.zeros((slots, rows), jnp.int32)
        tokens = FlatTokens.from_rows(ids_BQ, starts_B, counts_B)
        flat_TmD = tokens.flat(jnp.moveaxis(taps_BmSD, 2, 1))
        return drafter.observe(cache, flat_TmD, tokens)

    @jax.jit
    def propose(cache, tokens_BS, lengths_B):
        context = DraftContext.of(tokens_BS, lengths_B)
        proposal, cache = drafter.propose(
            model, cache, context, Sampler(greedy_draw), zoo.BLOCK
        )
        return proposal.tokens_BG, proposal.confidence_BG, proposal.q.log_q_BGW, cache

    return drafter, observe, propose


def taps_of(drafter, seed):
    shape = (SLOTS, len(drafter.taps), ROWS, zoo.TARGETS["llama"].hidden_size)
    return jnp.asarray(np.random.default_rng(seed).normal(0, 3, shape), jnp.float32)


def tokens(seed=5):
    random = np.random.default_rng(seed)
    return jnp.asarray(random.integers(0, zoo.VOCAB, (SLOTS, LENGTH)), jnp.int32)


def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def each(*values):
    """One number for each slot."""
    return jnp.array(values, jnp.int32)


NONE = each(0, 0, 0)


def test_rewind_equals_never_having_seen(case):
    """Context A+B, a block drafted, rewind to A, context C: as A+C."""
    drafter, observe, propose = case
    a, b, c = (taps_of(drafter, seed) for seed in (9, 7, 5))
    kept, dropped, new = each(9, 12, 1), each(7, 1, 12), each(5, 2, 9)
    straight = observe(drafter.init_cache(SLOTS, LENGTH), a, NONE, kept)
    cache = observe(straight, b, kept, dropped)
    *_, cache = propose(cache, tokens(), kept + dropped + 1)
    seen, expected = (
        propose(observe(before, c, kept, new), tokens(), kept + new + 1)[:3]
        for before in (cache, straight)
    )
    close(seen, expected)


def test_context_matters(case):
    drafter, observe, propose = case
    counts, seen = each(9, 1, 12), []
    for seed in (1, 2):
        empty = drafter.init_cache(SLOTS, LENGTH)
        cache = observe(empty, taps_of(drafter, seed), NONE, counts)
        seen.append(propose(cache, tokens(), counts + 1)[2])
    assert (np.abs(seen[0] - seen[1]).max(axis=(1, 2)) > 1e-2).all()


def test_context_may_come_in_pieces(case):
    drafter, observe, propose = case
    taps, full = taps_of(drafter, 0), each(12, 12, 12)
    whole = observe(drafter.init_cache(SLOTS, LENGTH), taps, NONE, full)
    cache = drafter.init_cache(SLOTS, LENGTH)
    for begin, end in ((0, 5), (5, 6), (6, 12)):
        piece = jnp.roll(taps, -begin, axis=2)
        cache = observe(cache, piece, NONE + begin, NONE + end - begin)
    seen, expected = (
        propose(cache, tokens(), full + 1),
        propose(whole, tokens(), full + 1),
    )
    close(seen[:3], expected[:3])


def test_slots_do_not_see_each_other(case):
    """Permuting slots permutes proposals, at different lengths."""
    drafter, observe, propose = case
    taps, counts, order = taps_of(drafter, 0), each(12, 3, 7), np.array([2, 0, 1])

    def run(order):
        empty = drafter.init_cache(SLOTS, LENGTH)
        cache = observe(empty, taps[order], NONE, counts[order])
        return propose(cache, tokens()[order], counts[order] + 1)[:3]

    close(jax.tree.map(lambda x: x[order], run(np.arange(3))), run(order))


def test_padding_writes_nothing(case):
    drafter, observe, _ = case
    empty = drafter.init_cache(SLOTS, LENGTH)
    cache = observe(empty, taps_of(drafter, 0), each(3, 5, 0), each(0, 2, 0))
    if isinstance(cache, Eagle3Cache):
        features_BS = np.abs(np.asarray(cache.features.rows_LBSH[0])).sum(axis=2) > 0
        assert np.argwhere(features_BS).tolist() == [[1, 5], [1, 6]]
        # A token completes the pair of the place before it.
        cache, places = [cache.pairs], [[1, 4], [1, 5]]
    else:
        places = [[1, 5], [1, 6]]
    for layer in cache:
        written_BS = np.abs(np.asarray(layer.k_BKSH)).sum(axis=(1, 3)) > 0
        assert np.argwhere(written_BS).tolist() == places


def test_drafts_are_tokens_of_the_drafters_vocabulary(case):
    drafter, _, propose = case
    empty = drafter.init_cache(SLOTS, LENGTH)
    drafts_BG, _, log_q_BGW, _ = propose(empty, tokens(), each(1, 4, 9))
    pruned = drafter.draft_ids is not None
    ids_W = drafter.draft_ids[...] if pruned else np.arange(zoo.VOCAB)
    assert len(ids_W) == (zoo.VOCAB // 2 if pruned else zoo.VOCAB)
    assert log_q_BGW.shape == (SLOTS, zoo.BLOCK, len(ids_W))
    assert np.isin(drafts_BG, ids_W).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(block_size=0), "block_size must be at least 1, got 0"),
        (dict(target_layer_ids=(1, 0)), r"ascending, got \(1, 0\)"),
        (dict(target_layer_ids=(0, 7)), "must lie in -1..1"),
        (dict(markov_head_type="lstm"), "unknown markov_head_type 'lstm'"),
        (dict(draft_vocab_size=0), "draft_vocab_size must lie in 1..61, got 0"),
        (dict(draft_vocab_size=62), "draft_vocab_size must lie in 1..61, got 62"),
        (dict(markov_rank=0), "needs markov_rank > 0"),
        (dict(mask_token_id=999), "mask_token_id 999 lies outside"),
    ],
    ids=str,
)
def test_impossible_configurations_are_refused(change, message):
    config: DSparkConfig = draft_configs.dspark(zoo.TARGETS["llama"])
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


def test_released_tap_positions_are_reproduced():
    deep = replace(zoo.TARGETS["llama"], num_hidden_layers=36)
    assert draft_configs.taps(deep) == (1, 9, 17, 25, 33)
    deeper = replace(zoo.TARGETS["llama"], num_hidden_layers=40)
    assert draft_configs.taps(deeper) == (1, 10, 19, 28, 37)
