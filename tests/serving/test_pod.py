"""Two processes are one server; what is decided is decided by the first."""

import json
import re
import signal
import threading
import time

import httpx
import jax
import pytest

from jaxspark.checkpoints import save_target
from jaxspark.decoding import AdjustmentLimits, DecodeOptions
from jaxspark.drafters import NgramDrafter
from jaxspark.exactness.prefix import BLOCK, VOCAB, audited_pair
from jaxspark.generation import ContinuousBatch, Request, generate
from jaxspark.generation.request import check
from jaxspark.generation.slot_pages import SlotPages
from jaxspark.grammars import Calls, Grammar, StructuralTags, Tag
from jaxspark.grammars.source import source
from jaxspark.grammars.vocabulary import vocabulary
from jaxspark.parallel.mesh import make_mesh
from jaxspark.serving.commands import Command
from jaxspark.text.thinking import ThinkFormat
from tests.serving import hosting
from tests.serving.pods import FLAGS, asked, pod

DIGITS = {"kind": "regex", "value": "[0-9]{3}(-[0-9]{4}){2}"}
PROMPTS = ("abcabc", "a long prompt, read in parts, with ababab in it", "xyz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pod")
    save_target(folder / "target", hosting.target())
    return folder


def streamed(http, body, chunks=None):
    """The text of a stream; of its first chunks, if not of all."""
    text = ""
    with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        assert answer.status_code == 200
        for number, line in enumerate(answer.iter_lines()):
            if number == chunks:
                return text
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                text += "".join(each["text"] for each in event["choices"])
    return text


def alone(prompt, **changes):
    """What one process says on the same mesh."""
    [completion] = generate(
        *(hosting.target(), [prompt], NgramDrafter(block_length=2)),
        coupling="gumbel",
        **(
            {"max_new_tokens": 30, "temperature": 0.8, "seed": 3, "stop_ids": ()}
            | changes
        ),
    )
    return completion.text


@pytest.mark.long
def test_two_processes_serve_what_one_says_and_drain_together(folder):
    """What happens if one is lost is in tests/soak."""
    with jax.set_mesh(make_mesh("model:2", jax.devices()[:2])):
        expected = [alone(prompt) for prompt in PROMPTS]
        biased = alone("abcabc", logit_bias={98: 5.0}, bad_words=["a"])
        obeys = alone("abcabc", stop_ids=None, grammar=Grammar(**DIGITS))
        assert re.fullmatch(DIGITS["value"], obeys)
    with (
        pod(folder, *FLAGS, supervised=False) as here,
        httpx.Client(base_url=here.url, timeout=60) as http,
    ):
        for stream in (False, True):
            for prompt, text in zip(PROMPTS, expected):
                body = asked(prompt)
                if stream:
                    assert streamed(http, body) == text
                else:
                    answer = http.post("/v1/completions", json=body).json()
                    assert answer["choices"][0]["text"] == text
        wishes = {"logit_bias": {"98": 5.0}, "bad_words": ["a"]}
        answer = http.post("/v1/completions", json=asked(**wishes)).json()
        assert answer["choices"][0]["text"] == biased
        wishes = {"structured_outputs": {"regex": DIGITS["value"]}, "ignore_eos": False}
        answer = http.post("/v1/completions", json=asked(**wishes)).json()
        assert answer["choices"][0]["text"] == obeys
        # Clients that leave free their slots on both.
        for _ in range(3):
            streamed(http, asked(n=2, max_tokens=100), chunks=3)
        assert streamed(http, asked(PROMPTS[1])) == expected[1]
        seen = http.get("/stats").json()
        assert (seen["running"], seen["late_compilations"]) == (0, 0)
        told = []

        def ask():
            told.append(httpx.post(f"{here.url}/v1/completions", json=body, timeout=60))

        body = asked(max_tokens=60)
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for each in threads:
            each.start()
        while http.get("/stats").json()["waiting"] == 0:
            time.sleep(0.01)
        # The one that does not answer is asked to end: all finish what they have.
        here.processes[1].send_signal(signal.SIGTERM)
        for each in threads:
            each.join()
        assert here.ends() == [0, 0], here.said
    assert [each.status_code for each in told] == [200] * 4
    assert len({each.json()["choices"][0]["text"] for each in told}) == 1


@pytest.mark.long
@pytest.mark.parametrize("asked", [0, 1])
def test_two_processes_that_still_compile_end_together(folder, asked):
    def compiles(here):
        return any("compiling" in line for line in here.said[0])

    with pod(folder, *FLAGS, supervised=False, until=compiles) as here:
        here.processes[asked].send_signal(signal.SIGTERM)
        assert here.ends() == [0, 0], here.said
    assert not any("compiled" in line for line in here.said[0])


def test_a_process_that_decided_otherwise_does_not_go_on():
    """Commands are told as they are meant, and only to a batch that is as far."""
    first, second = (
        ContinuousBatch(
            *(hosting.target(), None),
            slots=1,
            capacity=64,
            adjustments=AdjustmentLimits(biases=4),
        )
        for _ in range(2)
    )
    request = Request([97, 98], max_new_tokens=3, logit_bias={98: 2.0}, seed=5)
    checked = check(request, 7, first.target, first.limits)
    command = Command(
        arriving=[(checked, "salt")],
        unwanted=[],
        rounds=1,
        decisions=first.decisions,
    )
    message = command.encode()
    again = Command.decode(message, second)
    [(other, salt)] = again.arriving
    assert salt == "salt" and other.params.logit_bias == {98: 2.0}
    for name in ("index", "ids", "seed", "stop_ids", "adjustment", "max_drafts"):
        assert getattr(other, name) == getattr(checked, name)
    updates = [command.apply(first), again.apply(second)]
    assert updates[0] == updates[1] and first.decisions == second.decisions
    second.step(1)
    command = Command(arriving=[], unwanted=[], rounds=1, decisions=first.decisions)
    with pytest.raises(RuntimeError, match="decided otherwise than process 0"):
        Command.decode(command.encode(), second)


def test_grammars_are_told_as_they_are_meant():
    batch = ContinuousBatch(hosting.target(), slots=1, capacity=64)
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    tags = StructuralTags(
        structures=[Tag(begin="<f>", schema={"const": 1}, end="</f>")], triggers=["<"]
    )
    calls = Calls(form="hermes", tools=[tool], parallel=True)
    grammars = [
        Grammar(**DIGITS),
        Grammar(kind="choice", value=("one", "two")),
        Grammar(kind="json_schema", value={"enum": [1.5, None, "é"]}),
        Grammar(kind="calls", value=Calls(form="llama3", tools=[tool], parallel=False)),
        Grammar(kind="structural_tag", value=tags),
        Grammar(kind="json_object", thinking=ThinkFormat(newlines=False), opened=True),
        Grammar(kind="json_object", calls=calls),
    ]
    for grammar in grammars:
        request = Request("x", max_new_tokens=3, grammar=grammar)
        checked = check(request, 7, batch.target, batch.limits)
        command = Command(
            arriving=[(checked, None)],
            unwanted=[],
            rounds=1,
            decisions=batch.decisions,
        )
        [(other, _)] = Command.decode(command.encode(), batch).arriving
        told = other.params.grammar
        assert (told.kind, told.thinking) == (grammar.kind, grammar.thinking)
        tokens = vocabulary(batch.target.tokenizer, 300)
        assert source(told, tokens) == source(grammar, tokens)


def test_what_follows_from_commands_is_the_same_on_every_process(random):
    """Slots, pages, hits and preemptions, by two batches that cannot see each other."""
    model, drafter = audited_pair("dense", "ngram")
    told, follows = (
        ContinuousBatch(
            *(model, drafter),
            slots=3,
            capacity=512,
            chunk=32,
            pages=SlotPages(slots=3, capacity=512, pages=6, chunk=32),
            options=DecodeOptions(block_length=BLOCK, coupling="gumbel"),
        )
        for _ in range(2)
    )
    known = random.integers(0, VOCAB, (2, 200)).tolist()
    here, index = [], 0
    for _ in range(150):
        arriving = []
        if told.room and random.random() < 0.5:
            prompt = known[random.integers(2)][: random.integers(150, 200)]
            request = Request(
                prompt + random.integers(0, VOCAB, random.integers(30, 60)).tolist(),
                max_new_tokens=int(random.integers(40, 90)),
                temperature=1.0,
                seed=index,
                stop_ids=(),
            )
            checked = check(request, index, told.target, told.limits)
            arriving.append((checked, None))
            here.append(index)
            index += 1
        unwanted = [here.pop()] if here and random.random() < 0.05 else []
        command = Command(
            arriving=arriving,
            unwanted=unwanted,
            rounds=int(random.integers(1, 5)),
            decisions=told.decisions,
        )
        again = Command.decode(command.encode(), follows)
        assert command.apply(told) == again.apply(follows)
    assert told.decisions == follows.decisions
    assert told.preemptions > 0 and told._pages.hits > 0
