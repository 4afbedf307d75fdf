"""The engine: what plain decoding gives, whatever happens beside it; nobody is lost."""

import asyncio
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from jaxspark.decoding import AdjustmentLimits, DecodeOptions, Fixed, Lagged
from jaxspark.decoding.rehearsal import lead
from jaxspark.generation import ContinuousBatch, Request, generate
from jaxspark.generation.seats import Seats
from jaxspark.generation.slots import Running
from jaxspark.grammars import Grammar
from jaxspark.serving import (
    ApiError,
    Demand,
    Ended,
    Engine,
    Overloaded,
    Pace,
    Prefilled,
    QueueLimits,
    Tokens,
)
from jaxspark.target import Target
from tests import zoo
from tests.serving.hosting import slowed

CONTEXT = 96
SETTINGS = {
    "slots": 3,
    "context": CONTEXT,
    "chunk": 16,
    "together": 2,
    "queue": QueueLimits(requests=40, tokens=2000),
    "pace": Pace(few=1, most=4),
    # For most tests here there is nothing to compile of it.
    "adjustments": AdjustmentLimits(),
    "top_log_probs": 0,
    "prompt_log_probs": False,
}
# What engines have by default.
EVERYTHING = {
    "adjustments": AdjustmentLimits.serving(),
    "top_log_probs": 20,
    "prompt_log_probs": True,
}


def engine(drafter, **changes):
    """An engine of the tiny target."""
    model = zoo.target()
    made = zoo.drafter(drafter, model) if drafter else None
    options = DecodeOptions(coupling="gumbel", block_length=3 if drafter else None)
    return Engine(Target(model=model), made, options=options, **(SETTINGS | changes))


@pytest.fixture(scope="module")
def running():
    """One that runs; nothing is compiled late, and nothing is left in its slots."""
    with engine("ngram", **EVERYTHING) as made:
        yield made
        assert made.wait_idle(10)
        assert made.stats().compilations > 0 == made.stats().late_compilations
        assert made._batch.idle and made._batch.free == 3


@pytest.fixture(scope="module")
def plain():
    """Plain decoding of a request alone; remembered."""
    known, model = {}, zoo.target()

    def plain(request):
        if repr(request) not in known:
            [known[repr(request)]] = generate(
                *(model, [request.prompt]),
                params=request.params,
                log_probs=True,
                coupling="gumbel",
                capacity=128,
                adjustments=AdjustmentLimits.serving(),
            )
        return known[repr(request)]

    return plain


WISHES = (
    {"presence_penalty": 1.0, "frequency_penalty": -0.5},
    {"repetition_penalty": 1.5, "logit_bias": {3: 5.0}},
    {"min_tokens": 8, "stop_ids": tuple(range(0, 60, 5))},
    {"allowed_ids": tuple(range(20, 60)), "bad_words": ((30,), (31, 32))},
)


SIXTY_FIVE = [[1 + i // 60, i % 60] for i in range(65)]


def request(i, **changes):
    """One of few, greedy and sampled, short and long."""
    [prompt] = zoo.prompts([1, 2, 17, 40, 71][i % 5], seed=i % 5)
    values = {
        "max_new_tokens": [1, 9, 20][i % 3],
        "temperature": float(i % 2),
        "seed": i,
        "stop_ids": [(), (5, 6, 7)][i // 2 % 2],
        "log_probs": i % 4 == 0,
    }
    return Request(prompt, **(values | changes))


# What is told beside tokens, at most.
TOLD = {"log_probs": True, "top_log_probs": 20, "prompt_log_probs": 3}


def assert_likely(seen, expected):
    """The same tokens, equally likely."""
    assert [token for token, _ in seen] == [token for token, _ in expected]
    np.testing.assert_allclose(
        [each for _, each in seen], [each for _, each in expected], atol=1e-4
    )


def stream_prompt(events):
    """What was told of the prompt."""
    [prefilled] = [each for each in events if isinstance(each, Prefilled)]
    return prefilled.prompt


def assert_prompt(told, asked, expected):
    """What plain decoding tells of a prompt; the first token has nothing before it."""
    assert [each.token for each in told] == list(asked.prompt)
    assert told[0].log_prob is None and expected.prompt_log_probs[0] is None
    for each, other in zip(told[1:], expected.prompt_log_probs[1:], strict=True):
        np.testing.assert_allclose(each.log_prob, other.log_prob, atol=1e-4)
        assert each.rank == other.rank
        assert_likely(each.top, other.top)


def demand(asked, choice=0, **values):
    """A request as an engine takes it."""
    return Demand(group="g", choice=choice, request=asked, **values)


def tokens_of(events, choice=0):
    """Tokens that were told, and how it ended."""
    own = [each for each in events if each.choice == choice]
    assert sum(isinstance(each, Ended) for each in own) == 1
    assert isinstance(own[-1], Ended)
    told = [t for each in own if isinstance(each, Tokens) for t in each.tokens]
    if told:
        assert isinstance(own[0], Prefilled)
    return told, own[-1]


@pytest.mark.parametrize(
    "drafter", [pytest.param(None, marks=pytest.mark.long), "ngram", "dspark-gated"]
)
def test_tokens_and_log_probs_are_those_of_plain_decoding(drafter, plain, running):
    made = running if drafter == "ngram" else engine(drafter, **EVERYTHING)
    if made is not running:
        made.start()
        made.wait_ready()
    asked = [request(i) for i in range(20)]
    asked += [request(i, max_new_tokens=16, **TOLD, **WISHES[i % 4]) for i in range(8)]
    streams = [
        made.submit(demand(each), client=str(len(each.prompt))) for each in asked
    ]
    for each, stream in zip(asked, streams):
        events = list(stream)
        told, end = tokens_of(events)
        expected = plain(each)
        assert [t.token for t in told] == expected.tokens
        assert end.reason == expected.finish_reason
        if each.params.log_probs:
            np.testing.assert_allclose(
                [t.log_prob for t in told], expected.log_probs, atol=1e-4
            )
        else:
            assert all(t.log_prob is None for t in told)
        assert [len(t.top) for t in told] == [each.params.top_log_probs] * len(told)
        for t, top in zip(told, expected.top_log_probs or ()):
            assert_likely(t.top, top)
        if each.params.prompt_log_probs is not None:
            assert_prompt(stream_prompt(events), each, expected)
    stats = made.stats()
    assert stats.late_compilations == 0 and stats.running == stats.waiting == 0
    if made is not running:
        made.stop()
        assert made.state == "stopped"


def test_any_sequence_of_submitting_and_cancelling_leaves_all_slots_idle(
    running, plain, random
):
    before, streams = running.stats().output_tokens, []
    for life in range(150):
        asked = request(int(random.integers(20)))
        try:
            streams.append((asked, running.submit(demand(asked), client=str(life % 3))))
        except Overloaded:
            time.sleep(0.01)
        if streams and random.uniform() < 0.4:
            streams[int(random.integers(len(streams)))][1].cancel()
    reasons = set()
    for asked, stream in streams:
        told, end = tokens_of(list(stream))
        reasons.add(end.reason)
        expected = plain(asked).tokens
        assert [t.token for t in told] == expected[: len(told)]
        assert end.reason == "cancelled" or len(told) == len(expected)
    assert running.wait_idle(10) and "cancelled" in reasons and len(reasons) > 1
    stats = running.stats()
    assert (stats.running, stats.waiting, stats.waiting_tokens) == (0, 0, 0)
    assert running._batch.idle and running._batch.free == 3
    assert stats.output_tokens > before


def test_outputs_of_a_group_share_a_stream_and_end_one_by_one(running, plain):
    asked = [request(9, seed=seed, stop_ids=()) for seed in range(4)]
    events = list(running.submit(*(demand(a, i) for i, a in enumerate(asked))))
    for choice, each in enumerate(asked):
        told, end = tokens_of(events, choice)
        assert [t.token for t in told] == plain(each).tokens and end.reason == "length"


def test_streams_are_read_in_event_loops_and_one_output_can_be_stopped(
    running, monkeypatch
):
    slowed(running, monkeypatch)

    async def read():
        asked = request(1, max_new_tokens=60, stop_ids=())
        stream = running.submit(demand(asked, 0), demand(asked, 1))
        events = []
        async for event in stream:
            events.append(event)
            if isinstance(event, Tokens) and event.choice == 1:
                stream.cancel(1, "stop")
        return events

    events = asyncio.run(read())
    first, stopped = tokens_of(events, 0), tokens_of(events, 1)
    assert len(first[0]) == 60 and first[1].reason == "length"
    assert len(stopped[0]) < 60 and stopped[1].reason == "stop"


def test_a_request_that_waits_too_long_fails_and_one_that_runs_too_long_is_cut(
    running, monkeypatch
):
    slowed(running, monkeypatch)
    long = request(1, max_new_tokens=60, stop_ids=())
    ones = [running.submit(demand(long, deadline_s=0.3)) for _ in range(3)]
    late = running.submit(demand(long, deadline_s=0.05))
    told, end = tokens_of(list(late))
    assert not told and (end.reason, end.status) == ("error", 504)
    assert "its timeout is 0.05 s" in end.error
    for stream in ones:
        told, end = tokens_of(list(stream))
        assert 0 < len(told) < 60 and end.reason == "cancelled"


def test_late_outputs_of_a_request_that_has_begun_fail_nobody(running, monkeypatch):
    """Others of the request have tokens, and keep them; there are three slots."""
    slowed(running, monkeypatch)
    long = request(1, max_new_tokens=60, stop_ids=())
    demands = [
        Demand(group="g", choice=choice, request=long, deadline_s=0.3)
        for choice in range(5)
    ]
    events = list(running.submit(*demands))
    told = [tokens_of(events, choice) for choice in range(5)]
    assert [end.reason for _, end in told] == ["cancelled"] * 5
    assert [len(tokens) > 0 for tokens, _ in told] == [True] * 3 + [False] * 2


def test_a_prompt_that_is_read_too_long_fails(running, monkeypatch):
    slowed(running, monkeypatch)
    [prompt] = zoo.prompts([71])
    late = running.submit(demand(Request(prompt, max_new_tokens=9), deadline_s=0.08))
    told, end = tokens_of(list(late))
    assert not told and (end.reason, end.status) == ("error", 504)
    assert "for its first token, its timeout is 0.08 s" in end.error
    assert running.wait_idle(5) and running._batch.idle


def test_what_cannot_be_served_is_refused_by_name_and_harms_nobody(running, plain):
    good = request(0)
    for bad, match, param in (
        (
            request(0, grammar=Grammar(kind="json_object"), stop_ids=(1,)),
            "no tokenizer",
            None,
        ),
        (request(0, presence_penalty=2.1), "presence_penalty", "presence_penalty"),
        (request(0, bad_words=SIXTY_FIVE), "65 bad_words", None),
        (request(0, bad_words=["a"]), "no tokenizer", None),
        (request(0, allowed_ids=[3], bad_words=[[3]]), "leave no token", None),
        (request(0, allowed_ids=[-3]), "token id", "allowed_token_ids"),
        (request(1, top_log_probs=2), "log_probs is not set", None),
        (Request([0] * 90, max_new_tokens=20), "positions|context", "prompt"),
        (Request([0] * 80, max_new_tokens=17), "context", "prompt"),
        (Request([zoo.VOCAB], max_new_tokens=4), "token id", "prompt"),
        (Request([0], max_new_tokens=4, temperature=-1.0), "temper", "temperature"),
        (Request([0], max_new_tokens=4, stop_ids=range(17)), "ids", "stop_token_ids"),
    ):
        with pytest.raises(ApiError, match=match) as error:
            running.submit(demand(good), demand(bad))
        assert (error.value.status, error.value.param) == (400, param)
    told, _ = tokens_of(list(running.submit(demand(good))))
    assert [t.token for t in told] == plain(good).tokens


def test_a_full_queue_turns_requests_away(running, monkeypatch):
    slowed(running, monkeypatch)
    long = request(1, max_new_tokens=60, stop_ids=())
    streams = [running.submit(demand(long)) for _ in range(40)]
    with pytest.raises(Overloaded, match="at most 40") as error:
        running.submit(*(demand(long, i) for i in range(5)))
    bad = Request([zoo.VOCAB], max_new_tokens=4)
    with pytest.raises(Overloaded):  # before anything is checked, which takes a while
        running.submit(*(demand(bad, i) for i in range(5)))
    assert 1 <= error.value.retry_after_s <= 60
    for stream in streams:
        stream.cancel()
        tokens_of(list(stream))
    assert running.wait_idle(10)


def test_a_long_prompt_delays_others_by_a_chunk_at_a_time(running):
    model = zoo.target()
    batch = ContinuousBatch(
        model, zoo.drafter("ngram", model), slots=3, capacity=128, chunk=16, together=2,
        max_stop_ids=16, log_probs=True, accepted=True, rounds_per_step=4,
        options=running.options,
    )  # fmt: skip
    short = batch.submit(request(1, max_new_tokens=40, stop_ids=(), temperature=1.0))
    batch.step(rounds=1)
    long = batch.submit(request(4, max_new_tokens=4, stop_ids=()))
    between, rounds, flags, completions = 0, 0, [], {}
    while not batch.idle:
        updates = {each.index: each for each in batch.step(rounds=1)}
        if batch.unread:
            assert len(updates[short].tokens) > 0 and long not in updates
            between += 1
        for index, each in updates.items():
            if index == long:
                rounds += each.counts.rounds
                flags += each.accepted
            if each.completion:
                completions[index] = each.completion
    # 70 tokens in chunks of 16; the last chunk is followed by the first round.
    assert between == 4
    # Every round brings one token that is no draft.
    assert rounds == completions[long].rounds == flags.count(False)
    assert len(flags) == 4 == len(completions[long].tokens)


def test_short_prompts_pass_long_ones_and_none_is_left_behind():
    """Slots are not filled by long ones that are not read yet."""
    model = zoo.target()
    made = Engine(
        Target(model=model), **(SETTINGS | {"slots": 8, "chunk": 4, "together": 2})
    )
    made._desk.become("ready")
    few = {"max_new_tokens": 2, "stop_ids": ()}
    for seed in range(3):
        made.submit(demand(Request(zoo.prompts(70)[0], seed=seed, **few)))
    made.submit(demand(Request(zoo.prompts(40)[0], seed=3, **few)))
    for seed in range(4, 7):
        made.submit(demand(Request(zoo.prompts(8)[0], seed=seed, **few)))
    arrived, ended = [], []
    while not made._desk.idle:
        turn = made._next_turn()
        arrived += [each.request.seed for each in turn.arriving]
        for update in made._step(turn):
            if update.completion:
                ended.append(made._desk.running[update.index].request.seed)
            made._desk.tell(update)
    # The third waited for the first, and those that are shorter did not wait for it.
    assert arrived == [0, 1, 3, 4, 5, 6, 2]
    assert ended == [4, 5, 6, 3, 0, 1, 2]


@pytest.mark.parametrize("lanes", [1, 2])
def test_lanes_go_to_the_first_and_to_the_shortest_of_every_shard(lanes):
    seats = Seats(6, per_shard=3, block=0, pages=None)
    unread = {0: 30, 1: 20, 2: 10, 4: 50, 5: 40}
    for slot, goal in unread.items():
        request = SimpleNamespace(index=slot, ids=[], matcher=None)
        seats.running[slot] = Running(request, goal=goal + 1)
    first, shortest = {0, 4}, {2, 5}
    turns = [set(seats.readers(lanes)) for _ in range(4)]
    if lanes == 1:
        assert turns == [first, shortest] * 2
    else:
        assert turns == [first | shortest] * 4


def test_a_device_that_fails_ends_every_request_with_an_error(monkeypatch):
    calls = []
    with engine("ngram", on_failure=lambda: calls.append(1)) as made:
        broken, step = [], made._batch.step

        def fragile(*args, **kwargs):
            time.sleep(0.01)
            if broken:
                raise RuntimeError("a device was lost")
            return step(*args, **kwargs)

        monkeypatch.setattr(made._batch, "step", fragile)
        asked = request(1, max_new_tokens=60, stop_ids=())
        streams = [made.submit(demand(asked), demand(asked, 1)) for _ in range(4)]
        next(iter(streams[0]))
        broken.append(1)
        for stream in streams:
            ends = [each for each in stream if isinstance(each, Ended)]
            assert [each.reason for each in ends] == ["error"] * 2
            assert ends[0].error == "the engine failed" and ends[0].status == 500
        with pytest.raises(Overloaded, match="failed"):
            made.submit(demand(asked))
    made._thread.join(10)
    assert made.state == "failed" and calls == [1]


def test_an_engine_can_be_failed_while_its_thread_hangs(monkeypatch):
    """As it does in a collective with a process that was lost."""
    calls, hung, back = [], threading.Event(), threading.Event()
    with engine("ngram", on_failure=lambda: calls.append(1)) as made:

        def hang(*args, **kwargs):
            hung.set()
            back.wait()
            raise RuntimeError("a peer was lost")

        monkeypatch.setattr(made._batch, "step", hang)
        asked = request(1, max_new_tokens=60, stop_ids=())
        streams = [made.submit(demand(asked)) for _ in range(8)]
        hung.wait()
        made.fail("process 1 of this server was lost")
        for stream in streams:
            [ended] = stream
            assert (ended.reason, ended.status) == ("error", 500)
            assert ended.error == "process 1 of this server was lost"
        assert made.state == "failed"
    # It was left without waiting for the thread.
    assert made._thread.is_alive() and calls == [1]
    back.set()
    made._thread.join(10)
    assert not made._thread.is_alive() and calls == [1]


def test_draining_finishes_what_is_there_and_stopping_ends_it():
    with engine("ngram") as made:
        asked = [request(i) for i in range(8)]
        streams = [made.submit(demand(each)) for each in asked]
        made.drain()
        with pytest.raises(Overloaded, match="draining"):
            made.submit(demand(asked[0]))
        assert made.wait_idle(20)
        for stream in streams:
            assert tokens_of(list(stream))[1].reason in ("stop", "length")
    with engine("ngram") as made:
        streams = [made.submit(demand(request(i))) for i in range(8)]
        made.stop()
        ends = [tokens_of(list(stream))[1] for stream in streams]
        assert {each.status for each in ends if each.reason == "error"} <= {503}
        assert all(stream.ended for stream in streams)


def test_when_an_engine_is_ready_it_has_decoded_in_every_branch_and_learned_nothing(
    monkeypatch,
):
    taken = []

    def led(state, lengths, **branch):
        taken.append(tuple(branch.values()))
        return lead(state, lengths, **branch)

    monkeypatch.setattr("jaxspark.generation.batch.lead", led)
    with engine("dspark-vanilla") as made:
        options = made.options
        branches = {
            (length, size)
            for length in options.draft_lengths
            for size in options.sizes(SETTINGS["slots"], length)
        }
        assert set(taken) == branches and len(branches) > 1
        memory, _ = made._batch.learned()
        assert (memory.history_BnG == -1).all()
        assert not memory.rounds_since_BG.any()
        assert made._batch.idle


def test_a_schedule_without_costs_gets_those_of_the_rounds_that_are_served(plain):
    model = zoo.target()
    made = Engine(
        Target(model=model),
        zoo.drafter("dspark-vanilla", model),
        options=DecodeOptions(block_length=2, coupling="gumbel", schedule=Lagged()),
        **SETTINGS,
    )
    batch, calls = made._batch, []
    round_in = batch.round_in

    def counted():
        counters = batch._state.counters
        return np.array([np.sum(counters.drafted_B), np.sum(counters.verified_B)])

    def watched(branch, lengths_B, rounds=1, **changes):
        before = counted()
        round_in(branch, lengths_B, rounds=rounds, **changes)
        calls.append((branch, rounds, *(counted() - before)))

    batch.round_in = watched
    with made:
        guess = batch.options.schedule.costs.seconds
        memory, _ = batch.learned()
        [seconds] = np.unique(memory.seconds_BJ, axis=0)
        assert len(seconds) == len(batch.branches) == len(guess) and len(guess) > 3
        assert np.all(seconds > 0) and not np.any(seconds == np.float32(guess))
        # All rounds that were timed together took the branch.
        assert max(rounds for _, rounds, *_ in calls) > 1
        for (length, size), rounds, drafted, verified in calls:
            assert drafted == (rounds * 3 if length else 0)
            assert verified == rounds * (size - 3)
        drafts = np.array([length for length, _ in batch.branches])
        for dear, drafted in ((1e4, False), (1e-4, True)):
            batch.retime(np.where(drafts > 0, dear, 1.0))
            before = made.stats().drafted
            for i in range(1, 6):
                asked = request(i, max_new_tokens=9, stop_ids=(), log_probs=False)
                told, _ = tokens_of(list(made.submit(demand(asked))))
                assert [each.token for each in told] == plain(asked).tokens
            assert made.wait_idle(10)
            assert (made.stats().drafted > before) == drafted
        assert made.stats().late_compilations == 0


def test_requests_with_one_seed_are_not_drawn_together_where_that_would_matter():
    """A schedule under rejection sampling must not see draws that depend."""
    costs = zoo.costs((3, 12), (1.5, 2.0), plain=1.0, length=3)
    for schedule, together in ((Lagged(costs=costs), [1, 2]), (Fixed(), [1, 1, 2])):
        options = DecodeOptions(block_length=3, schedule=schedule)
        model = zoo.target()
        made = Engine(
            Target(model=model),
            zoo.drafter("ngram", model),
            options=options,
            **SETTINGS,
        )
        made._desk.become("ready")
        for client, seed in enumerate((1, 1, 2)):
            made.submit(demand(request(1, seed=seed)), client=str(client))
        turn = made._next_turn()
        seeds = [each.request.seed for each in turn.arriving]
        assert seeds == together


def test_programs_are_compiled_in_a_thread_that_ends(monkeypatch):
    threads = []

    def warm_up(batch):
        threads.append(threading.current_thread())

    monkeypatch.setattr("jaxspark.serving.engine.warm_up", warm_up)
    with engine("ngram") as made:
        [thread] = threads
        assert thread is not made._thread and not thread.is_alive()


def test_an_engine_that_still_compiles_is_stopped_at_once(monkeypatch):
    compiling, compiled = threading.Event(), threading.Event()

    def warm_up(batch):
        compiling.set()
        compiled.wait()

    monkeypatch.setattr("jaxspark.serving.engine.warm_up", warm_up)
    made = engine("ngram")
    made.start()
    compiling.wait()
    made.drain()
    assert made.wait_idle(0)
    made.stop()
    assert made._thread.is_alive() and not made.compiled
    compiled.set()
    made._thread.join(10)
    assert not made._thread.is_alive() and made.state == "stopped"


def test_an_engine_that_cannot_be_started_says_so(monkeypatch):
    def broken(batch):
        raise RuntimeError("no memory")

    calls = []
    monkeypatch.setattr("jaxspark.serving.engine.warm_up", broken)
    made = engine("ngram", on_failure=lambda: calls.append(1))
    made.start()
    with pytest.raises(RuntimeError, match="failed while it was started"):
        made.wait_ready()
    made._thread.join(5)
    assert calls == [1]
    with pytest.raises(Overloaded, match="failed"):
        made.submit(demand(request(0)))
