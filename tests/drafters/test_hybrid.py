"""The hybrid follows the source that has proved better, slot by slot."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspark.drafters import DraftContext, NgramDrafter, PlainDrafter, hybrid
from jaxspark.drafters.hybrid import History
from jaxspark.generation import generate
from tests import zoo
from tests.driver import Sampler, greedy_draw

G = 4


def propose(drafter, model, rows, cache=None):
    """One proposal for slots of these tokens, no context observed."""
    width = max(map(len, rows)) + G
    tokens_BS = np.zeros((len(rows), width), np.int32)
    for slot, row in enumerate(rows):
        tokens_BS[slot, : len(row)] = row
    cache = drafter.init_cache(len(rows), width) if cache is None else cache
    lengths_B = jnp.array([len(row) for row in rows])
    return _propose(drafter, model, cache, jnp.asarray(tokens_BS), lengths_B)


@jax.jit
def _propose(drafter, model, cache, tokens_BS, lengths_B):
    context = DraftContext.of(tokens_BS, lengths_B)
    return drafter.propose(model, cache, context, Sampler(greedy_draw), G)


@pytest.fixture(scope="module")
def pair():
    model = zoo.target()
    return model, zoo.drafter("hybrid-pruned", model)


def test_a_long_match_is_copied_and_a_new_text_is_not(pair):
    model, drafter = pair
    repeated, fresh = (
        [7, 8, 9, 10, 11, 7, 8, 9, 10],
        [20, 21, 22, 23, 24, 25, 26, 27, 28],
    )
    proposal, _ = propose(drafter, model, [repeated, fresh])
    assert proposal.q.deterministic_B.tolist() == [True, False]
    assert proposal.tokens_BG[0].tolist() == [11, 7, 8, 9]
    alone, _ = propose(drafter.model, model, [repeated, fresh])
    assert proposal.tokens_BG[1].tolist() == alone.tokens_BG[1].tolist()
    np.testing.assert_allclose(
        proposal.confidence_BG[1], alone.confidence_BG[1], atol=1e-5
    )
    # What the model thinks of its own drafts says nothing of copies.
    np.testing.assert_allclose(
        proposal.certainty_BG[1], alone.certainty_BG[1], atol=1e-5
    )
    assert not proposal.certainty_BG[0].any() and alone.certainty_BG.all()


def test_the_model_is_not_run_when_every_slot_copies(pair):
    model, drafter = pair
    row = [7, 8, 9, 10, 11, 7, 8, 9, 10]
    _, (context, _) = propose(drafter, model, [row, row])
    assert all(not np.asarray(layer.k_BKSH).any() for layer in context)


def test_history_counts_drafts_that_held_and_the_first_that_did_not():
    history = History.start(3, longest=4, block_length=G)
    before = history
    history = History(
        tried_BM=history.tried_BM,
        held_BM=history.held_BM,
        drafts_BG=jnp.array([[5, 6, 7, 8]] * 3),
        source_B=jnp.array([3, 0, 2]),
        length_B=jnp.array([2, 2, 0]),
    )
    tokens_BS = jnp.array([[1, 2, 5, 6, 9, 0, 0, 0]] * 3)
    # Two held and one failed; all three committed ones; no proposal before.
    after = history.updated(tokens_BS, jnp.array([5, 4, 5]))
    tried = np.round(after.tried_BM - before.tried_BM, 4)
    held = np.round(after.held_BM - before.held_BM, 4)
    assert tried.tolist() == [[0, 0, 0, 3, 0], [2, 0, 0, 0, 0], [0] * 5]
    assert held.tolist() == [[0, 0, 0, 2, 0], [2, 0, 0, 0, 0], [0] * 5]


def test_a_source_that_fails_is_left(pair):
    """Copies that never hold: after some rounds the model is asked."""
    model, drafter = pair
    row = [7, 8, 9, 10, 11, 7, 8, 9, 10]
    proposal, (context, history) = propose(drafter, model, [row])
    assert proposal.q.deterministic_B.tolist() == [True]
    rounds = 0
    while proposal.q.deterministic_B[0] and rounds < 50:
        rounds += 1
        failed = History(
            tried_BM=history.tried_BM,
            held_BM=history.held_BM,
            drafts_BG=jnp.full((1, G), 3),
            source_B=history.source_B,
            length_B=jnp.array([8]),
        )
        proposal, (context, history) = propose(drafter, model, [row], (context, failed))
    assert 1 < rounds < 50


def test_what_a_shorter_proposal_did_not_say_is_not_counted():
    tokens_BS = jnp.array([[1, 2, 3, 4, 5, 6]])
    history = History.start(1, longest=4, block_length=3)
    said = replace(history, drafts_BG=jnp.array([[3, -1, -1]]), length_B=jnp.array([2]))
    after = said.updated(tokens_BS, jnp.array([4]))
    tried, held = after.tried_BM - said.tried_BM, after.held_BM - said.held_BM
    np.testing.assert_allclose((tried[0, 0], held[0, 0]), 1, atol=1e-5)


def test_confidence_is_the_rate_of_the_match_length(pair):
    model, drafter = pair
    row = [7, 8, 9, 10, 11, 7, 8, 9, 10]
    proposal, (_, history) = propose(drafter, model, [row])
    rate = history.rates()[0, 4]
    np.testing.assert_allclose(
        jax.nn.sigmoid(proposal.confidence_BG[0]), rate, rtol=1e-5
    )


@pytest.mark.long
def test_it_beats_its_parts_on_a_text_that_repeats():
    model = zoo.target()
    prompts = zoo.prompts(5, 9, 7)
    lengths = {}
    for name in ("ngram", "dspark-gated", "hybrid"):
        outputs = generate(
            model,
            prompts,
            zoo.drafter(name, model),
            max_new_tokens=60,
            block_length=G,
            buckets=(3 * (G + 1),),
        )
        lengths[name] = sum(each.rounds for each in outputs)
    assert lengths["hybrid"] <= min(lengths.values()) * 1.1


def test_only_lookup_may_come_first():
    with pytest.raises(ValueError, match="must be an NgramDrafter, got PlainDrafter"):
        hybrid(PlainDrafter(), NgramDrafter())
