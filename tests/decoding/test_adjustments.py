"""Logits of every row of a round are adjusted as their definition says."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspark.decoding import Adjustment, AdjustmentLimits
from jaxspark.decoding.adjusted_logits import Adjuster
from jaxspark.decoding.adjustment_arrays import Adjustments, unpacked
from jaxspark.exactness.by_definition import adjusted_by_definition
from jaxspark.models import FlatTokens

# More than two words of bits, and no multiple of their size.
VOCAB, CAPACITY, BLOCK = 70, 24, 3
PROMPTS, LENGTHS = (3, 6, 1, 4), (5, 14, 1, 9)
STOPS = ((1, 3), (), (2,), (5, 60))
KINDS = {
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -0.7},
    "repetition": {"repetition_penalty": 1.7},
    "bias": {"logit_bias": {0: -100.0, 33: 4.0, 69: 0.5}},
    "allowed": {"allowed_ids": (0, 1, 2, 31, 32, 64, 69)},
    "min_tokens": {"min_tokens": 6},
    "bad words": {"bad_words": ((4,), (1, 2), (2, 2), (2, 1, 0), (1, 1, 2, 0))},
}
KINDS["everything"] = {
    name: value for kind in KINDS.values() for name, value in kind.items()
}


def round_of(random, adjustments, limits=None, *, live=(True,) * 4):
    """Slots in the middle of a round: their adjuster, rows, drafts, and texts."""
    limits = AdjustmentLimits.of(adjustments) if limits is None else limits
    # Few tokens, so that they are there more than once.
    tokens_BS = random.integers(0, 4, (4, CAPACITY))
    # A prompt may end with what begins a bad word: it is none.
    tokens_BS[2, 0] = 1
    drafts_BG = random.integers(0, 4, (4, BLOCK))
    anchors_B = jnp.array(LENGTHS) - 1
    stops_BX = np.full((4, 2), -1)
    for slot, stops in enumerate(STOPS):
        stops_BX[slot, : len(stops)] = stops
    adjuster = Adjuster.of(
        Adjustments.of(adjustments, limits, vocab=VOCAB, prompt_lengths=PROMPTS),
        tokens_BS=jnp.array(tokens_BS),
        anchors_B=anchors_B,
        stop_ids_BX=jnp.array(stops_BX),
        live_B=jnp.array(live),
    )
    rows_BQ = np.concatenate(
        [tokens_BS[np.arange(4), np.array(LENGTHS) - 1][:, None], drafts_BG], axis=1
    )
    counts_B = jnp.array([4, 2, 4, 0])
    tokens = FlatTokens.from_rows(jnp.array(rows_BQ), anchors_B, counts_B, capacity=12)
    texts = [
        tokens_BS[slot, : LENGTHS[slot]].tolist() + drafts_BG[slot].tolist()
        for slot in range(4)
    ]
    return adjuster, tokens, jnp.array(drafts_BG), texts


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_adjusted_by_definition(kind, random):
    """A slot that wants nothing is left alone, beside others that do."""
    own = Adjustment(**KINDS[kind])
    adjustments = [own, own, own, Adjustment()]
    adjuster, tokens, drafts_BG, texts = round_of(random, adjustments)
    logits_TV = jnp.array(random.normal(size=(12, VOCAB)), jnp.float32)
    seen_TV = jax.jit(Adjuster.rows)(adjuster, logits_TV, tokens, drafts_BG)
    for row, (slot, position) in enumerate(
        zip(np.asarray(tokens.slots_T), np.asarray(tokens.positions_T))
    ):
        if slot < 0:
            continue
        text, prompt = texts[slot][: position + 1], PROMPTS[slot]
        expected_V = adjusted_by_definition(
            np.asarray(logits_TV[row]),
            text[:prompt],
            text[prompt:],
            adjustments[slot],
            STOPS[slot],
        )
        np.testing.assert_allclose(seen_TV[row], expected_V, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_first_drafts_are_drawn_from_logits_adjusted_like_the_anchors(kind, random):
    """Over the whole vocabulary, and over a part of it."""
    own = Adjustment(**KINDS[kind])
    adjuster, _, _, texts = round_of(random, [own] * 4)
    logits_BV = jnp.array(random.normal(size=(4, VOCAB)), jnp.float32)
    ids_W = jnp.array([0, 2, 5, 33, 64])
    whole_BV = adjuster.drafts(logits_BV, jnp.int32(0), None)
    part_BW = adjuster.drafts(logits_BV[:, ids_W], jnp.int32(0), ids_W)
    # What several tokens make a bad word is left to verification.
    static = replace(own, bad_words=[word for word in own.bad_words if len(word) == 1])
    for slot in range(4):
        text, prompt = texts[slot][: LENGTHS[slot]], PROMPTS[slot]
        expected_V = adjusted_by_definition(
            np.asarray(logits_BV[slot]),
            text[:prompt],
            text[prompt:],
            static,
            STOPS[slot],
        )
        np.testing.assert_allclose(whole_BV[slot], expected_V, atol=1e-5)
        np.testing.assert_allclose(
            part_BW[slot], expected_V[np.asarray(ids_W)], atol=1e-5
        )


def test_drafts_come_nearer_to_the_least_length(random):
    adjuster, *_ = round_of(random, [Adjustment(min_tokens=4)] * 4)
    logits_BV = jnp.zeros((4, VOCAB))
    banned_jB = [
        jnp.isinf(adjuster.drafts(logits_BV, jnp.int32(j), None)).any(axis=1)
        for j in range(4)
    ]
    # The first slot has two output tokens, the third none, the fourth five.
    assert [bool(banned_B[0]) for banned_B in banned_jB] == [True, True, False, False]
    assert all(banned_B[2] and not banned_B[3] for banned_B in banned_jB)


def test_a_draft_vocabulary_of_banned_tokens_drafts_as_it_would(random):
    adjuster, *_ = round_of(random, [Adjustment(allowed_ids=(7,))] * 4)
    logits_BW = jnp.array(random.normal(size=(4, 2)), jnp.float32)
    seen_BW = adjuster.drafts(logits_BW, jnp.int32(0), jnp.array([5, 9]))
    np.testing.assert_array_equal(seen_BW, logits_BW)


def test_where_nobody_asks_logits_stay_to_the_bit(random):
    """A slot that has ended does not ask."""
    adjustments = [Adjustment()] * 3 + [Adjustment(presence_penalty=2.0)]
    live = (True, True, True, False)
    limits = AdjustmentLimits.serving()
    adjuster, tokens, drafts_BG, _ = round_of(random, adjustments, limits, live=live)
    assert not adjuster.any_asks
    logits_TV = jnp.array(random.normal(size=(12, VOCAB)), jnp.float32)
    np.testing.assert_array_equal(
        adjuster.rows(logits_TV, tokens, drafts_BG), logits_TV
    )
    np.testing.assert_array_equal(
        adjuster.drafts(logits_TV[:4], jnp.int32(0), None), logits_TV[:4]
    )


def test_bits_are_those_of_the_allowed_tokens():
    """The first token's is the lowest, as in the masks that grammars give."""
    limits = AdjustmentLimits(exclusions=True)
    own = Adjustment(allowed_ids=(0, 31, 32, 69), bad_words=((31,),))
    made = Adjustments.of(
        [own, Adjustment()], limits, vocab=VOCAB, prompt_lengths=[1] * 2
    )
    assert made.allowed_BU.tolist() == [[1, 1, 1 << 5], [2**32 - 1] * 3]
    may_BV = np.asarray(unpacked(made.allowed_BU, VOCAB))
    assert np.flatnonzero(may_BV[0]).tolist() == [0, 32, 69] and may_BV[1].all()


@pytest.mark.parametrize(
    ("limits", "adjustment", "words"),
    [
        ({}, {"presence_penalty": 1.0}, "penalties are asked for"),
        ({"penalties": True}, {"min_tokens": 1}, "min_tokens are asked for"),
        ({}, {"allowed_ids": (1,)}, "allowed_ids or bad_words are asked for"),
        ({"biases": 1}, {"logit_bias": {1: 1, 2: 1}}, "2 tokens of logit_bias"),
        ({}, {"bad_words": ((1, 2),)}, "1 bad_words of several tokens"),
        (
            {"bad_words": 1, "bad_word_tokens": 2},
            {"bad_words": ((1, 2, 3),)},
            "3 tokens of one of bad_words, this batch has room for 2",
        ),
    ],
)
def test_what_was_not_compiled_is_refused_by_name(limits, adjustment, words):
    with pytest.raises(ValueError, match=words):
        AdjustmentLimits(**limits).check(Adjustment(**adjustment))


def test_the_least_limits_do_for_what_they_were_made_of():
    made = [Adjustment(**kind) for kind in KINDS.values()]
    for some in (made, made[:1], made[3:4], made[-2:-1]):
        limits = AdjustmentLimits.of(some)
        for each in some:
            limits.check(each)
    assert not AdjustmentLimits.of([Adjustment()]).anything
    assert AdjustmentLimits.of(made[:3]) == AdjustmentLimits(penalties=True)


def test_some_token_must_always_be_left():
    Adjustment(allowed_ids=(1, 2), min_tokens=2).check(3, [2])
    for hopeless in (
        {"allowed_ids": ()},
        {"allowed_ids": (2,), "min_tokens": 2},
        {"allowed_ids": (1, 2), "min_tokens": 1, "bad_words": ((0, 1),)},
        {"bad_words": ((0,), (1,), (2,))},
    ):
        with pytest.raises(ValueError, match="leave no token"):
            Adjustment(**hopeless).check(3, [2])
