"""What every drafter promises: context by position, slots apart, clear errors."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspark.configs import drafters as draft_configs
from jaxspark.drafters import DSparkConfig
from jaxspark.drafters.eagle3 import Eagle3Cache
from jaxspark.models import FlatTokens
from tests import zoo

LENGTH = 48


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
        flat_TmD = tokens.view().collect(jnp.moveaxis(taps_BmSD, 2, 1))
        return drafter.observe(cache, jnp.moveaxis(flat_TmD, 0, -1), tokens)

    @jax.jit
    def propose(cache, tokens_BS, lengths_B):
        def draw(logits_BW, j, ids_W):
            place_B = jnp.argmax(logits_BW, -1).astype(jnp.int32)
            token_B = place_B if ids_W is None else ids_W[place_B]
            return token_B, logits_BW, logits_BW[:, 0]

        proposal, cache = drafter.propose(
            model, cache, tokens_BS, lengths_B, draw, zoo.BLOCK
        )
        return proposal.tokens_BG, proposal.confidence_BG, proposal.log_q_BGW, cache

    return drafter, observe, propose


def taps_of(drafter, slots, rows, seed):
    shape = (slots, len(drafter.taps), rows, zoo.TARGETS["llama"].hidden_size)
    return jnp.asarray(np.random.default_rng(seed).normal(0, 3, shape), jnp.float32)


def tokens_of(slots, seed=5):
    random = np.random.default_rng(seed)
    return jnp.asarray(random.integers(0, zoo.VOCAB, (slots, LENGTH)), jnp.int32)


def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def starts(*values):
    return jnp.array(values, jnp.int32)


def test_rewind_equals_never_having_seen(case):
    """Context A+B, a block drafted, rewind to A, context C: as A+C."""
    drafter, observe, propose = case
    a, b, c = (taps_of(drafter, 1, rows, rows) for rows in (9, 7, 5))
    tokens = tokens_of(1)
    cache = observe(drafter.init_cache(1, LENGTH), a, starts(0), starts(9))
    cache = observe(cache, b, starts(9), starts(7))
    *_, cache = propose(cache, tokens, starts(17))
    cache = observe(cache, c, starts(9), starts(5))
    seen = propose(cache, tokens, starts(15))[:3]
    cache = observe(drafter.init_cache(1, LENGTH), a, starts(0), starts(9))
    cache = observe(cache, c, starts(9), starts(5))
    close(seen, propose(cache, tokens, starts(15))[:3])


def test_context_matters(case):
    drafter, observe, propose = case
    tokens = tokens_of(1)
    seen = []
    for seed in (1, 2):
        taps = taps_of(drafter, 1, 9, seed)
        cache = observe(drafter.init_cache(1, LENGTH), taps, starts(0), starts(9))
        seen.append(propose(cache, tokens, starts(10))[2])
    assert np.abs(seen[0] - seen[1]).max() > 1e-2


def test_context_may_come_in_pieces(case):
    drafter, observe, propose = case
    taps, tokens = taps_of(drafter, 1, 12, 0), tokens_of(1)
    whole = observe(drafter.init_cache(1, LENGTH), taps, starts(0), starts(12))
    cache = drafter.init_cache(1, LENGTH)
    for begin, end in ((0, 5), (5, 6), (6, 12)):
        cache = observe(
            cache, taps[:, :, begin:end], starts(begin), starts(end - begin)
        )
    close(
        propose(cache, tokens, starts(13))[:3], propose(whole, tokens, starts(13))[:3]
    )


def test_slots_do_not_see_each_other(case):
    """Permuting slots permutes proposals, at different lengths."""
    drafter, observe, propose = case
    taps, tokens = taps_of(drafter, 3, 12, 0), tokens_of(3)
    counts, order = starts(12, 3, 7), np.array([2, 0, 1])

    def run(order):
        cache = observe(
            drafter.init_cache(3, LENGTH), taps[order], starts(0, 0, 0), counts[order]
        )
        return propose(cache, tokens[order], counts[order] + 1)[:3]

    close(jax.tree.map(lambda x: x[order], run(np.arange(3))), run(order))


def test_padding_writes_nothing(case):
    drafter, observe, _ = case
    cache = observe(
        drafter.init_cache(2, LENGTH),
        taps_of(drafter, 2, 4, 0),
        starts(3, 5),
        starts(0, 2),
    )
    if isinstance(cache, Eagle3Cache):
        features_BS = np.abs(np.asarray(cache.features_BSD)).sum(axis=2) > 0
        assert np.argwhere(features_BS).tolist() == [[1, 5], [1, 6]]
        # A token completes the pair of the place before it.
        cache, places = [cache.pairs], [[1, 4], [1, 5]]
    else:
        places = [[1, 5], [1, 6]]
    for layer in cache:
        written_BS = np.abs(np.asarray(layer.k_BKSH)).sum(axis=(1, 3)) > 0
        assert np.argwhere(written_BS).tolist() == places


def test_a_pruned_vocabulary_proposes_only_its_own_tokens():
    model = zoo.target()
    drafter = zoo.drafter("dspark-pruned", model)

    def draw(logits_BW, j, ids_W):
        return ids_W[jnp.argmax(logits_BW, -1)], logits_BW, logits_BW[:, 0]

    proposal, _ = drafter.propose(
        model, drafter.init_cache(2, LENGTH), tokens_of(2), starts(4, 9), draw, 4
    )
    assert proposal.log_q_BGW.shape == (2, 4, zoo.VOCAB // 2)
    assert np.isin(proposal.tokens_BG, drafter.draft_ids[...]).all()


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
