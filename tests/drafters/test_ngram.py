"""Prompt lookup proposes what followed the longest, newest match."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxspark.drafters import DraftContext, NgramDrafter


def proposal_after(text, *, length=4, garbage=0, **options):
    """A proposal after `text`, one token per character; a garbage tail follows it."""
    ids = [ord(c) for c in text] + [garbage] * 16
    drafter = NgramDrafter(block_length=length, **options)
    proposal, _ = drafter.propose(
        None,
        (),
        DraftContext.of(jnp.array([ids], jnp.int32), jnp.array([len(text)])),
        None,
        length,
    )
    return proposal


def propose(text, **options):
    """Drafts after `text`."""
    proposal = proposal_after(text, **options)
    count = int(proposal.lengths_B[0])
    return "".join(map(chr, np.asarray(proposal.tokens_BG)[0, :count]))


def test_continues_the_match():
    assert propose("the cat sat; the ca") == "t sa"


def test_prefers_the_longest_suffix_over_the_newest():
    # After "xab" came "1"; the newer "ab" was followed by "2".
    assert propose("xab1 yab2 xab", length=1) == "1"


def test_prefers_the_newest_of_equally_long_matches():
    assert propose("ab1ab2ab", length=1) == "2"


def test_a_copy_that_reaches_the_anchor_goes_round():
    assert propose("xyzabab", length=6, longest=2) == "ababab"


def test_a_single_repeated_token_goes_on():
    assert propose("aaa", length=3) == "aaa"


def test_proposes_nothing_without_a_match():
    assert propose("abcdef") == ""
    assert propose("abca", shortest=2) == ""
    assert propose("abca", shortest=1, length=2) == "bc"


def test_never_reads_past_the_length():
    for garbage in (ord("a"), ord("b"), ord("c")):
        assert propose("abcab", garbage=garbage, length=3) == "cab"


def test_one_token_has_nothing_to_match():
    assert propose("a", shortest=1) == ""


def test_a_block_has_at_least_one_token():
    with pytest.raises(ValueError, match="block_length must be at least 1, got 0"):
        NgramDrafter(block_length=0)


def test_suffix_lengths_must_be_in_order():
    with pytest.raises(ValueError, match="shortest=3, longest=2"):
        NgramDrafter(longest=2, shortest=3)


def test_copies_of_longer_matches_are_believed_more():
    texts = ("ab1 cd", "yab1 xab", "yab1 yab", "zyab1 zyab", "wzyab1 wzyab")
    logits = [
        float(proposal_after(text, shortest=1).confidence_BG[0, 0]) for text in texts
    ]
    # Of no match, which proposes nothing, and of 2, 3, 4 and more tokens.
    assert all(np.isfinite(logits))
    np.testing.assert_allclose(
        1 / (1 + np.exp(-np.array(logits[1:]))), [0.5, 0.65, 0.8, 0.8], rtol=1e-5
    )
