"""Who is next, and who is turned away."""

import threading

import pytest

from jaxspark.decoding import DecodeOptions, Fixed
from jaxspark.drafters import NgramDrafter, PlainDrafter
from jaxspark.generation import Request
from jaxspark.generation.request import CheckedRequest
from jaxspark.serving import ApiError, Demand, Ended, Overloaded, QueueLimits, Stream
from jaxspark.serving.buckets import with_buckets
from jaxspark.serving.desk import Desk
from jaxspark.serving.jobs import Job
from jaxspark.serving.pace import Pace, Pacer
from jaxspark.serving.waiting import WaitingLine

INDICES = iter(range(10**6))


def job(client="a", prompt=4, priority=0, expires=None, seed=0):
    """A job with nothing behind it."""
    request = Request([0] * prompt)
    index = next(INDICES)
    return Job(
        demand=Demand(
            group=str(index),
            choice=0,
            request=request,
            priority=priority,
            deadline_s=expires,
        ),
        request=CheckedRequest(
            index=index,
            ids=[0] * prompt,
            stop_ids=[],
            seed=seed,
            min_drafts=0,
            max_drafts=0,
            params=request.params,
        ),
        client=client,
        stream=Stream(1, lambda choice, reason: None),
        arrived=float(index),
        expires=expires,
    )


def order(line):
    """Clients in the order in which they get slots."""
    return [each.client for each in line.take(100)]


def test_a_client_with_many_requests_does_not_hold_up_others():
    line = WaitingLine()
    for _ in range(4):
        line.push([job("greedy")])
    line.push([job("modest")])
    assert order(line) == ["greedy", "modest", "greedy", "greedy", "greedy"]


def test_those_who_were_served_less_go_first():
    line = WaitingLine()
    long, short = job("long"), job("short")
    line.push([long])
    line.push([short])
    assert line.take(2) == [long, short]
    line.charge(long, 100)
    for _ in range(3):
        line.push([job("long"), job("short")])
    assert order(line) == ["short"] * 3 + ["long"] * 3


def test_nobody_saves_up_service():
    line = WaitingLine()
    busy = job("busy")
    line.push([busy])
    line.take(1)
    line.charge(busy, 1000)
    line.push([job("new"), job("new"), job("busy")])
    assert order(line) == ["new", "busy", "new"]


def test_lower_priorities_go_first():
    line = WaitingLine()
    line.push([job("a", priority=1), job("b", priority=0), job("c", priority=-1)])
    assert order(line) == ["c", "b", "a"]


def test_others_pass_a_job_that_may_not_run():
    line = WaitingLine()
    line.push([job("a", seed=1), job("a", seed=2), job("b", seed=3)])
    taken = line.take(3, lambda each: each.request.seed != 1)
    assert [each.request.seed for each in taken] == [2, 3]
    assert [each.request.seed for each in line.take(1)] == [1]
    assert (len(line), line.tokens) == (0, 0)


def test_all_of_a_request_waits_or_none():
    line = WaitingLine(QueueLimits(requests=3, tokens=100))
    line.push([job(), job()])
    with pytest.raises(Overloaded, match="2 outputs wait, at most 3") as error:
        line.push([job(), job()], retry_after_s=7.2)
    assert (error.value.status, error.value.retry_after_s) == (503, 8)
    with pytest.raises(Overloaded, match="8 prompt tokens wait"):
        line.push([job(prompt=93)])
    with pytest.raises(ApiError, match="at most 3 can wait") as error:
        line.push([job()] * 4)
    assert error.value.status == 400
    assert (len(line), line.tokens) == (2, 8)
    assert len(line.take(5)) == 2 and (len(line), line.tokens) == (0, 0)


def test_a_desk_ends_what_is_late_and_what_is_left():
    desk = Desk(QueueLimits(), ())
    desk.become("ready")
    late, running, waiting = job(expires=0.0), job("b"), job("c")
    for each in (late, running, waiting):
        desk.take_on([each], retry_after_s=1)
    turn = desk.next_turn(1, bool)
    assert list(turn.arriving) == [running] and turn.waiting
    [end] = late.stream
    assert (end.reason, end.status) == ("error", 504)
    desk.end_all("it broke", status=500)
    for each in (running, waiting):
        assert list(each.stream) == [Ended(choice=0, reason="error", error="it broke")]
    assert desk.idle


def test_a_desk_takes_nothing_on_while_it_is_not_ready():
    desk = Desk(QueueLimits(), ())
    for state in ("starting", "draining", "failed"):
        desk.become(state)
        with pytest.raises(Overloaded, match=f"the engine is {state}"):
            desk.take_on([job()], retry_after_s=1)
    desk.become("ready")
    assert desk.state == "failed"
    assert desk.next_turn(1, bool) is None


def test_a_stream_waits_for_another_thread():
    stream = Stream(1, lambda choice, reason: None)
    end = Ended(choice=0, reason="stop")
    timer = threading.Timer(0.05, stream.put, [end])
    timer.start()
    assert list(stream) == [end] and stream.ended


def test_a_few_outputs_do_not_pay_for_all_slots():
    drafter = NgramDrafter(block_length=4)
    plain, fixed = DecodeOptions(), DecodeOptions(schedule=Fixed(2))
    assert with_buckets(plain, drafter, 8).buckets == (5, 8, 10, 20, 40)
    assert with_buckets(fixed, drafter, 6).buckets == (3, 6, 12, 18)
    assert with_buckets(plain, PlainDrafter(), 8).buckets is None
    own = DecodeOptions(buckets=(64,))
    assert with_buckets(own, drafter, 8) is own


def test_calls_are_short_while_prompts_are_read_and_else_as_long_as_they_should():
    pacer = Pacer(Pace(few=1, most=16, seconds=0.1))
    assert pacer.rounds(reading=False) == 1
    pacer.note(4, 0.08)
    assert pacer.rounds(reading=False) == 5
    assert pacer.rounds(reading=True) == 1
    for _ in range(50):
        pacer.note(1, 0.001)
    assert pacer.rounds(reading=False) == 16
