"""Pages are shared by prefix, taken back and given up, and no output notices.

The grids are those of `jaxspark audit --suite=prefix`, on the smallest models.
"""

import jax
import numpy as np
import pytest

from jaxspark.decoding import AdjustmentLimits, DecodeOptions
from jaxspark.exactness.prefix import (
    BLOCK,
    FEW_PAGES,
    VOCAB,
    Alignment,
    PrefixAudit,
    audited_pair,
)
from jaxspark.exactness.tiny_models import tiny_models
from jaxspark.generation import ContinuousBatch, Request
from jaxspark.generation.page_pool import PagePool
from jaxspark.generation.prefix_tree import PrefixTree
from jaxspark.generation.request import RequestError, check
from jaxspark.generation.slot_pages import SlotPages
from jaxspark.models.pages import PAGE, pages_for
from jaxspark.parallel.mesh import make_mesh


def made(family, name, **options):
    if family == "dense":
        return PrefixAudit(*audited_pair(family, name), **options)
    target, drafters = tiny_models(family, VOCAB, drafters=[name], block_length=BLOCK)
    return PrefixAudit(target, drafters[name], **options)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("dense", "eagle3"), id="dense eagle3"),
        pytest.param(
            ("dense", "hybrid-asks"), id="dense hybrid-asks", marks=pytest.mark.long
        ),
        pytest.param(
            ("deepseek_v4", "mtp"), id="deepseek_v4 mtp", marks=pytest.mark.long
        ),
    ],
)
def audited(request):
    return made(*request.param, pages=FEW_PAGES)


def test_a_hit_changes_nothing_to_the_last_bit(audited):
    hits = [
        hit
        for index, shared in enumerate((127, 128, 131, 256, 385))
        for hit in audited.hits(
            Alignment(shared=shared, own=1 + 33 * index % 50), index
        )
    ]
    assert not [each for hit in hits for each in hit.differences]
    assert sum(hit.cached > 0 for hit in hits) >= 7


def test_a_chunk_that_is_no_page_begins_hits_where_both_end():
    audited = made("dense", "ngram", chunk=96)
    assert audited.pages.unit == 384
    part, again = audited.hits(Alignment(shared=400, own=90))
    assert not part.differences + again.differences
    assert (part.cached, again.cached) == (384, 384)


def test_a_salt_has_prefixes_of_its_own(audited):
    prompt = np.random.default_rng(1).integers(0, VOCAB, 300).tolist()
    audited.pages.forget()
    cached = []
    for salt in ("a", "b", "a", None):
        audited.batch.enqueue(checked(audited, prompt), salt)
        cached += [
            update.cached for _ in range(40) for update in audited.batch.step()
            if update.completion
        ]  # fmt: skip
    assert cached == [0, 0, 256, 0]


def checked(audited, prompt):
    request = Request(prompt, max_new_tokens=4, stop_ids=())
    return check(request, 10**6, audited.batch.target, audited.batch.limits)


def test_any_sequence_says_what_plain_decoding_says_and_loses_no_page(audited):
    before = audited.pages.hits
    preempted = 0
    for seed in range(12 if not audited.pages.has_rings else 5):
        result, times, lost = audited.sequence(seed)
        assert not lost
        assert not result.violations
        preempted += times
    assert preempted > 0 and audited.pages.hits > before


@pytest.mark.long
def test_on_a_mesh_every_shard_of_slots_has_pages_and_prefixes_of_its_own():
    with jax.set_mesh(make_mesh("data:4,expert:2")):
        audited = made("dense", "ngram", pages=5, per_shard=2)
        hits = [
            hit
            for index, shared in enumerate((131, 385))
            for hit in audited.hits(Alignment(shared=shared, own=40), index)
        ]
        assert [hit.cached for hit in hits] == [128, 128, 384, 384]
        assert not [each for hit in hits for each in hit.differences]
        preempted, before = 0, audited.pages.hits
        for seed in range(3):
            result, times, lost = audited.sequence(seed)
            assert not lost
            assert not result.violations
            preempted += times
        assert preempted > 0 and audited.pages.hits > before


def test_a_request_goes_to_the_shard_that_has_most_of_its_text():
    pages = SlotPages(slots=6, capacity=640, pages=6, chunk=128, shards=3)

    def admitted(*numbers, free):
        slot, there = pages.admit(free, text(*numbers), 128 * len(numbers) + 1, None)
        for processed in range(128, 128 * len(numbers) + 1, 128):
            pages.progress(None, slot, processed)
        return slot, there

    assert admitted(1, 2, free=[0, 2, 4]) == (0, 0)
    assert admitted(3, free=[2, 1, 4]) == (2, 0)
    assert admitted(1, 2, 9, free=[3, 4, 1]) == (1, 256)
    # Where it is there is no slot, or there are no pages for the rest.
    assert admitted(3, 1, 1, 1, free=[3, 4]) == (4, 0)
    assert pages.admit([5, 3], text(1, 2, 9), 385, None) is None
    assert pages.reserve({0: 641, 2: 256}) == [0]
    for slot in (0, 1, 2, 4):
        pages.release(slot, 0)
    assert not pages.leaks() and pages.used == 0


def test_pages_are_those_of_the_mesh():
    model, drafter = audited_pair("dense", "ngram")
    pages = SlotPages(slots=4, capacity=256, pages=5, chunk=32, shards=2)
    with pytest.raises(ValueError, match="for 2 shards of slots, the mesh.*has 1"):
        ContinuousBatch(model, drafter, slots=4, capacity=256, chunk=32, pages=pages)


@pytest.mark.parametrize(
    "coupling", ["gumbel", pytest.param("rejection", marks=pytest.mark.long)]
)
def test_a_preempted_request_goes_on_with_the_same_tokens(coupling):
    """Two requests that together outgrow the pages; rounds of both begin as before."""
    prompts = np.random.default_rng(2).integers(0, VOCAB, (2, 240)).tolist()
    outputs = {}
    for pages in (5, 6):
        audited = made("dense", "ngram", pages=pages, coupling=coupling)
        for seed, prompt in enumerate(prompts):
            audited.batch.submit(
                Request(prompt, max_new_tokens=60, temperature=1.0, seed=seed,
                        stop_ids=(), log_probs=True)
            )  # fmt: skip
        ended = {}
        while not audited.batch.idle:
            for update in audited.batch.step():
                if update.completion:
                    ended[update.index] = update.completion
        assert (audited.batch.preemptions > 0) == (pages < 6)
        outputs[pages] = [ended[index] for index in sorted(ended)]
        assert not audited.pages.leaks()
    for one, other in zip(outputs[5], outputs[6]):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-4)
        assert one.rounds == other.rounds and one.accepted == other.accepted


@pytest.mark.long
def test_a_preempted_request_is_penalized_for_its_own_output_alone():
    """What it said before it waited is output still; its prompt is told once."""
    model, drafter = audited_pair("dense", "ngram")
    prompts = np.random.default_rng(3).integers(0, VOCAB, (2, 240)).tolist()
    outputs = {}
    for count in (5, 6):
        pages = SlotPages(slots=2, capacity=512, pages=count + 1, chunk=32)
        batch = ContinuousBatch(
            model, drafter, slots=2, capacity=512, chunk=32, pages=pages,
            options=DecodeOptions(block_length=BLOCK, coupling="gumbel"),
            log_probs=True, top_log_probs=2, prompt_log_probs=True,
            adjustments=AdjustmentLimits(penalties=True, min_tokens=True),
        )  # fmt: skip
        for seed, prompt in enumerate(prompts):
            batch.submit(
                Request(prompt, max_new_tokens=60, temperature=1.0, seed=seed,
                        stop_ids=(0,), min_tokens=55, presence_penalty=1.5,
                        frequency_penalty=0.5, log_probs=True, top_log_probs=2,
                        prompt_log_probs=1)
            )  # fmt: skip
        ended = {}
        while not batch.idle:
            for update in batch.step():
                if update.completion:
                    ended[update.index] = update.completion
        assert (batch.preemptions > 0) == (count < 6)
        outputs[count] = [ended[index] for index in sorted(ended)]
        assert not pages.leaks()
    for one, other in zip(outputs[5], outputs[6]):
        assert one.tokens == other.tokens and len(one.tokens) >= 55
        for mine, theirs in zip(one.top_log_probs, other.top_log_probs, strict=True):
            assert [token for token, _ in mine] == [token for token, _ in theirs]
        assert len(one.prompt_log_probs) == len(other.prompt_log_probs) == 240
        for mine, theirs in zip(one.prompt_log_probs[1:], other.prompt_log_probs[1:]):
            assert mine.rank == theirs.rank
            np.testing.assert_allclose(mine.log_prob, theirs.log_prob, atol=1e-4)


def test_log_probabilities_of_a_prompt_are_those_of_all_of_it():
    """Another request has read it, but only reading tells them."""
    model, drafter = audited_pair("dense", "ngram")
    prompt = np.random.default_rng(4).integers(0, VOCAB, 300).tolist()
    pages = SlotPages(slots=2, capacity=512, pages=9, chunk=32)
    batch = ContinuousBatch(
        model, drafter, slots=2, capacity=512, chunk=32, pages=pages,
        options=DecodeOptions(block_length=BLOCK), prompt_log_probs=True,
    )  # fmt: skip
    told = []
    for _ in range(2):
        batch.submit(Request(prompt, max_new_tokens=2, prompt_log_probs=0))
        updates = [update for _ in range(40) for update in batch.step()]
        told.append(updates[-1].completion.prompt_log_probs)
        assert updates[-1].cached == 0
    batch.submit(Request(prompt, max_new_tokens=2))
    assert [update for _ in range(40) for update in batch.step()][-1].cached == 256
    assert [each.rank for each in told[0][1:]] == [each.rank for each in told[1][1:]]
    assert len(told[0]) == 300


def test_what_can_never_fit_is_refused_with_the_numbers():
    audited = made("dense", "ngram", pages=3)
    with pytest.raises(
        RequestError,
        match=r"it needs 4 pages of 128 positions \(400 of its prompt, 20 new, a block "
        r"of 4\), the caches have 3 in all",
    ):
        audited.batch.submit(Request([0] * 400, max_new_tokens=20))


def test_prompts_are_read_by_the_chunk_that_pages_are_shared_at():
    model, drafter = audited_pair("dense", "ngram")
    pages = SlotPages(slots=2, capacity=256, pages=5, chunk=32)
    with pytest.raises(ValueError, match="multiples of 32 tokens.*read by 64"):
        ContinuousBatch(model, drafter, slots=2, capacity=256, chunk=64, pages=pages)


def test_a_mix_of_lengths_fits_three_times_the_requests():
    """A quarter of the longest on average: in the bytes of so many whole slots."""
    slots, longest = 16, 8192
    random = np.random.default_rng(0)
    lengths = np.minimum(random.exponential(longest / 4, 2000), longest).astype(int)
    pages = SlotPages(
        slots=len(lengths),
        capacity=longest,
        pages=1 + slots * pages_for(longest),
        chunk=256,
    )
    held = 0
    while pages.admit([held], [held] * lengths[held], int(lengths[held]), None):
        held += 1
    assert np.mean(lengths[:held]) == pytest.approx(longest / 4, rel=0.15)
    assert held >= 3 * slots


class TestPagePool:
    def test_a_page_is_free_once_its_last_holder_drops_it(self):
        pool = PagePool(4)
        first, second = pool.take(2)
        pool.hold([first])
        pool.drop([first, second])
        assert (pool.free, pool.holders(first), pool.holders(second)) == (2, 1, 0)
        pool.drop([first])
        assert pool.free == pool.size == 3
        assert 0 not in pool.take(3)

    def test_nobody_gets_what_is_not_free(self):
        pool = PagePool(3)
        pool.take(2)
        with pytest.raises(ValueError, match="1 pages are asked for, 0 are free"):
            pool.take(1)
        with pytest.raises(ValueError, match="at least 2 pages.*got 1"):
            PagePool(1)


def text(*pages):
    """A page of each number, and one token more."""
    return [page for page in pages for _ in range(PAGE)] + [0]


class TestPrefixTree:
    def test_the_longest_known_prefix_is_found(self):
        pool = PagePool(9)
        tree = PrefixTree(pool)
        tree.insert(None, text(1, 2, 3), pool.take(3))
        assert [n.end for n in tree.match(None, text(1, 2, 4), 3)] == [128, 256]
        assert len(tree.match(None, text(1, 2, 3), 2)) == 2
        assert not tree.match(None, text(2, 1), 2)
        assert not tree.match("salt", text(1, 2, 3), 3)

    def test_rows_that_depend_on_the_next_token_are_found_by_it(self):
        pool = PagePool(9)
        tree = PrefixTree(pool, lookahead=1)
        tree.insert(None, text(1, 2), pool.take(2))
        assert len(tree.match(None, text(1, 2), 2)) == 2
        assert len(tree.match(None, text(1, 3), 2)) == 0
        assert len(tree.match(None, text(1, 2)[:-1] + [5], 2)) == 1

    def test_what_is_known_stays_and_is_not_held_twice(self):
        pool = PagePool(9)
        tree = PrefixTree(pool)
        first, second = pool.take(2), pool.take(3)
        tree.insert(None, text(1, 2), first)
        path = tree.insert(None, text(1, 2, 3), second)
        assert [node.page for node in path] == [*first, second[2]]
        pool.drop([*first, *second])
        assert (tree.size, pool.free) == (3, 8 - 3)

    def test_the_longest_unused_leaf_goes_first_and_used_ones_stay(self):
        pool = PagePool(9)
        tree = PrefixTree(pool)
        pages = {n: pool.take(2) for n in (1, 2, 3)}
        for n, own in pages.items():
            tree.insert(None, text(n, n), own)
        pool.drop([page for n in (1, 2) for page in pages[n]])
        tree.use(tree.match(None, text(1, 1), 2))
        assert tree.evict(1) == 1
        assert len(tree.match(None, text(2, 2), 2)) == 1
        assert len(tree.match(None, text(1, 1), 2)) == 2
        assert tree.evict(9) == 3
        assert [node.page for node in tree.match(None, text(3, 3), 2)] == pages[3]

    def test_the_longest_unused_snapshot_is_dropped(self):
        pool = PagePool(9)
        tree = PrefixTree(pool, snapshots=2)
        nodes = tree.insert(None, text(1, 2, 3), pool.take(3))
        for node in nodes[:2]:
            tree.keep_snapshot(node, node.end)
        tree.use_snapshot(nodes[0])
        tree.keep_snapshot(nodes[2], 384)
        assert [node.snapshot for node in nodes] == [128, None, 384]
