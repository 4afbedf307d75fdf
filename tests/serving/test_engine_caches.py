"""The engine's caches: prefixes are shared, pages run out, and nobody is told wrong."""

from collections import defaultdict

import jax
import pytest

from jaxspark.decoding import DecodeOptions
from jaxspark.exactness.tiny_models import tiny_models
from jaxspark.generation import Request, generate
from jaxspark.parallel.mesh import make_mesh
from jaxspark.serving import Demand, Ended, Engine, Pace, Prefilled, Tokens
from jaxspark.serving.metrics import Metrics
from jaxspark.target import Target
from tests import zoo
from tests.serving.hosting import slowed

CONTEXT, NEW = 420, 24
[BEGIN] = zoo.prompts(300, seed=9)


def engine(drafter="eagle3", model=None, **changes):
    model = zoo.target() if model is None else model
    drafter = zoo.drafter(drafter, model) if isinstance(drafter, str) else drafter
    values = {
        "slots": 3,
        "context": CONTEXT,
        "chunk": 32,
        "together": 2,
        "options": DecodeOptions(coupling="gumbel", block_length=3),
        "pace": Pace(few=2, most=4),
    }
    return Engine(Target(model=model), drafter, **(values | changes))


def request(i, shared=270):
    prompt = BEGIN[:shared] + [i % zoo.VOCAB, 1, 2]
    return Request(
        prompt,
        max_new_tokens=NEW,
        temperature=float(i % 2),
        seed=i,
        stop_ids=(),
        log_probs=True,
    )


def told(made, asked, **values):
    """Cached tokens, tokens and log-probabilities of an output."""
    return read(made.submit(Demand(group="g", choice=0, request=asked, **values)))


def read(stream):
    events = list(stream)
    [begun] = [each for each in events if isinstance(each, Prefilled)]
    tokens = [t for each in events if isinstance(each, Tokens) for t in each.tokens]
    assert isinstance(events[-1], Ended) and events[-1].reason == "length"
    return begun.cached, [t.token for t in tokens], [t.log_prob for t in tokens]


def plain(asked):
    [completion] = generate(
        *(zoo.target(), [asked.prompt]),
        params=asked.params,
        coupling="gumbel",
        capacity=512,
    )
    return completion.tokens


@pytest.fixture(scope="module")
def running():
    metrics = Metrics("m")
    with engine(observers=[metrics]) as made:
        metrics.watch(made)
        made.metrics = metrics
        yield made
        assert made.wait_idle(10)
        assert made.stats().late_compilations == 0
        assert made.stats().pages_used == 0 and not made.pages.leaks()


def scraped(made, name):
    lines = made.metrics.text().decode().split("\n")
    [line] = [line for line in lines if line.startswith(name + "{")]
    return float(line.rpartition(" ")[2])


def test_a_prefix_is_cached_and_the_answer_stays_to_the_last_bit(running):
    cold = told(running, request(1))
    queries = scraped(running, "vllm:prefix_cache_queries_total")
    hit = told(running, request(1))
    assert (cold[0], hit[0]) == (0, 256)
    assert hit[1:] == cold[1:]
    assert cold[1] == plain(request(1))
    other = told(running, request(2))
    assert other[0] == 256 and other[1] == plain(request(2))
    assert running.stats().cached_tokens == 512
    assert scraped(running, "vllm:prefix_cache_hits_total") == 512
    assert scraped(running, "vllm:prompt_tokens_cached_total") == 512
    assert scraped(running, "vllm:prefix_cache_queries_total") == queries + 2 * 273


def test_a_salt_keeps_prefixes_apart(running):
    cached = [told(running, request(3), cache_salt=salt)[0] for salt in ("a", "b", "a")]
    assert cached == [0, 0, 256]


def test_outputs_that_come_together_read_what_they_share_once(running):
    """Of one prompt, and of two that begin alike."""
    asked = [request(i) for i in (1, 3)] * 2
    before = running.stats().cached_tokens
    streams = running.submit(
        *(
            Demand(group="g", choice=choice, request=each, cache_salt="together")
            for choice, each in enumerate(asked)
        )
    )
    outputs = defaultdict(list)
    for event in streams:
        outputs[event.choice].append(event)
    seen = [read(outputs[choice]) for choice in range(4)]
    assert sorted(cached for cached, _, _ in seen) == [0, 256, 256, 256]
    assert [tokens for _, tokens, _ in seen] == [plain(each) for each in asked]
    assert running.stats().cached_tokens - before == 3 * 256
    # Without what another salt has, nobody waits for others.
    alone = [told(running, request(1), cache_salt=salt)[0] for salt in ("one", "other")]
    assert alone == [0, 0]


def test_usage_of_pages_is_told(running):
    told(running, request(1))
    stats = running.stats()
    assert stats.pages == 3 * 4 and stats.pages_cached >= 2
    assert scraped(running, "vllm:kv_cache_usage_perc") == 0
    text = running.metrics.text().decode()
    assert 'block_size="128",engine="0",model_name="m",num_gpu_blocks="12"' in text


def test_pages_that_run_out_change_no_token():
    with engine("ngram", cache_pages=5) as made:
        asked = [request(i, shared=228 + i % 4) for i in range(10)]
        streams = [made.submit(Demand(group="g", choice=0, request=r)) for r in asked]
        cancelled = made.submit(Demand(group="g", choice=0, request=request(99)))
        cancelled.cancel()
        for one, stream in zip(asked, streams):
            assert read(stream)[1] == plain(one)
        assert list(cancelled)[-1].reason == "cancelled"
        assert made.wait_idle(10)
        assert made.stats().preempted > 0
        assert made.stats().late_compilations == 0
        assert not made.pages.leaks()


def test_an_output_that_waits_too_long_for_pages_fails(monkeypatch):
    metrics = Metrics("m")
    with engine("ngram", cache_pages=4, observers=[metrics]) as made:
        metrics.watch(made)
        slowed(made, monkeypatch, 0.05)
        first = made.submit(Demand(group="g", choice=0, request=request(0)))
        asked = Request(list(range(40)) * 7, max_new_tokens=NEW)
        late = made.submit(Demand(group="g", choice=0, request=asked, deadline_s=0.5))
        while (seen := made.stats()).running != 1 or not seen.deferred:
            assert not late.ended
        assert (seen.waiting, seen.waiting_tokens) == (1, 0)
        text = metrics.text().decode()
        for reason, count in (("capacity", 0), ("deferred", 1)):
            assert f'model_name="m",reason="{reason}"}} {count}.0' in text
        [end] = late
        assert (end.reason, end.status) == ("error", 504)
        assert read(first)[1] == plain(request(0))
        assert made.wait_idle(10) and not made.pages.leaks()


@pytest.mark.long
def test_snapshots_of_rings_are_compiled_before_anybody_comes():
    """The second prompt finds out where prompts part; the third begins there."""
    model, drafters = tiny_models(
        "deepseek_v4", zoo.VOCAB, drafters=["mtp"], block_length=3
    )
    with engine(drafters["mtp"], model=model) as made:
        cold = told(made, request(1), cache_salt="another")
        cached = [told(made, request(i, shared=200))[0] for i in (2, 3)]
        hit = told(made, request(1))
        assert (cold[0], cached, hit[0]) == (0, [0, 128], 128)
        assert hit[1:] == cold[1:]
        assert told(made, request(1))[0] == 256
        assert made.stats().late_compilations == 0


def test_memory_of_snapshots_is_bounded_and_there_from_the_beginning():
    model, drafters = tiny_models(
        "deepseek_v4", zoo.VOCAB, drafters=["mtp"], block_length=3
    )

    def made(**changes):
        """Pages, and bytes of what is there for snapshots."""
        pages = engine(drafters["mtp"], model=model, cache_pages=8, **changes).pages
        spare = [snapshot.parts for shard in pages._spare for snapshot in shard]
        return pages, sum(leaf.nbytes for leaf in jax.tree.leaves(spare))

    pages, most = made()
    one = sum(leaf.nbytes for leaf in jax.tree.leaves(pages._blank))
    # One more than are kept: it is taken before another is dropped.
    assert 3 * one < most <= (8 + 1) * one
    assert made(snapshot_bytes=3 * one - 1)[1] == 3 * one
    assert made(snapshot_bytes=1000 * one)[1] == (8 + 1) * one
    none, least = made(snapshot_bytes=one - 1)
    assert least == made(prefix_cache=False)[1] == 0
    # Nobody waits for what another reads if nothing of it will be kept.
    text = [1] * 300
    assert pages._shards[0].would_know(text, None, text)
    assert not none._shards[0].would_know(text, None, text)


@pytest.mark.long
@pytest.mark.parametrize("count", [0, 1])
def test_few_snapshots_are_used_again_and_again(count):
    model, drafters = tiny_models(
        "deepseek_v4", zoo.VOCAB, drafters=["mtp"], block_length=3
    )
    one = 38_400
    with engine(drafters["mtp"], model=model, snapshot_bytes=count * one) as made:
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(made.pages._blank)) == one
        cold = told(made, request(1))
        for i in (2, 3):
            told(made, request(i, shared=270 - i), cache_salt=str(i))
            assert told(made, request(i), cache_salt="other")[0] == 0
        again = [told(made, request(1)) for _ in range(2)]
        assert [each[0] for each in again] == [0, 256 * count]
        assert [each[1:] for each in again] == [cold[1:]] * 2
        assert len(made.pages._spare[0]) == 0


def test_pages_that_do_not_hold_the_context_are_refused():
    with pytest.raises(ValueError, match="hold outputs of 381 tokens.*420 takes 4 pag"):
        engine(cache_pages=3)
    assert engine(cache_pages=3, context=381).context == 381


def test_without_a_prefix_cache_slots_have_rows_of_their_own():
    made = engine(prefix_cache=False)
    assert made.pages is None and made._batch._state.pages_BP is None
    assert made.stats().pages == 3
    limited = engine(prefix_cache=False, cache_pages=8)
    assert limited._batch._state.pages_BP is not None


def test_prefixes_are_cached_on_a_mesh_and_everything_is_compiled_before():
    with jax.set_mesh(make_mesh("data:2", jax.devices()[:2])):
        with pytest.raises(ValueError, match="cache_pages is 9; the mesh has 2 shards"):
            engine("ngram", slots=4, cache_pages=9)
        with pytest.raises(ValueError, match="420 takes 8 pages"):
            engine("ngram", slots=4, cache_pages=6)
        made = engine("ngram", slots=4, cache_pages=10)
    with made:
        asked = [request(i) for i in (1, 2, 3)]
        cold = told(made, asked[0])
        assert [told(made, each)[0] for each in asked] == [256] * 3
        assert told(made, asked[0])[1:] == cold[1:]
        streams = [made.submit(Demand(group="g", choice=0, request=r)) for r in asked]
        assert [read(stream)[1] for stream in streams] == list(map(plain, asked))
        assert made.wait_idle(10)
        assert made.stats().pages == 10 and made.stats().late_compilations == 0
        assert not made.pages.leaks()
