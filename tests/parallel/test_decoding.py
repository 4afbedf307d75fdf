"""Guarantees on meshes: whatever the mesh, the tokens are those of one device.

Every drafter on every mesh is in `jaxspark audit --suite=mesh`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspark.decoding import DecodeOptions, DecodeState, Threshold, decode
from jaxspark.exactness.audit_schedules import ScheduleAudit, ScheduleCell
from jaxspark.exactness.tiny_models import tiny_models
from jaxspark.generation import Request, generate_stream
from jaxspark.grammars import Grammar
from jaxspark.parallel.mesh import make_mesh

COLLECTIVES = ("all_gather", "all_reduce", "all_to_all", "reduce_scatter", "permute")


@pytest.mark.parametrize(
    ("family", "drafter"),
    [
        ("dense", "dspark-rnn"),
        pytest.param("deepseek_v4", "deepseek_v4_dspark", marks=pytest.mark.long),
    ],
)
def test_tokens_are_those_of_one_device(family, drafter):
    """Slots, experts, heads and vocabulary are all shared out.

    The dense target's requests change their logits, and are told likely tokens.
    """
    audit = ScheduleAudit(
        family=family,
        slots=16,
        shards=8,
        drafters=[drafter],
        mixes=["stream"],
        couplings=["gumbel"],
        adjusted=family == "dense",
    )
    cell = ScheduleCell(
        drafter=drafter,
        schedule="lagged",
        coupling="gumbel",
        buckets="one",
        estimates=True,
    )
    with jax.set_mesh(make_mesh("data:2,expert:2,model:2")):
        result = audit.run(cell, mixes=("stream",))
    assert result.audit.tokens > 300
    assert not result.audit.violations
    assert len(result.audit.near_ties) <= 1
    assert 0 < result.drafted < result.rounds
    assert result.told_error <= 1e-4


class ByPlace:
    """A grammar that allows, at each place of an output, some tokens of all."""

    def __init__(self, taken=0):
        self.taken = taken

    def fork(self):
        return ByPlace(self.taken)

    def masks_along(self, drafts):
        places = range(self.taken, self.taken + len(drafts) + 1)
        return np.array([[allowed(place)] for place in places], np.uint32)

    def advance(self, tokens):
        for token in tokens:
            assert allowed(self.taken) >> token & 1
            self.taken += 1


def allowed(place):
    return int(np.random.default_rng(place).integers(1, 2**16))


@pytest.mark.long
def test_outputs_under_grammars_are_those_of_one_device(monkeypatch):
    """Shards have masks and q of their own."""
    monkeypatch.setattr(
        "jaxspark.generation.request.matcher_of", lambda *_, **__: ByPlace()
    )
    target, drafters = tiny_models(
        "dense", 16, drafters=["dspark-pruned"], block_length=4, shards=4
    )
    prompts = np.random.default_rng(0).integers(0, 16, (6, 5)).tolist()
    requests = [
        Request(
            prompt,
            max_new_tokens=16 + index,
            temperature=float(index % 4 > 0),
            seed=index,
            stop_ids=(),
            grammar=Grammar(kind="regex", value="any") if index % 3 else None,
        )
        for index, prompt in enumerate(prompts)
    ]

    def decoded():
        ended = generate_stream(
            *(target, requests, drafters["dspark-pruned"]),
            slots=4,
            capacity=48,
            options=DecodeOptions(schedule=Threshold(0.3)),
        )
        return [completion for _, completion in sorted(ended, key=lambda pair: pair[0])]

    alone = decoded()
    with jax.set_mesh(make_mesh("data:2,model:2", jax.devices()[:4])):
        seen = decoded()
    for one, other in zip(alone, seen):
        assert (one.tokens, one.accepted) == (other.tokens, other.accepted)
    assert sum(sum(each.accepted) for each in seen) > 20


def test_one_device_sends_nothing():
    """What shards agree on and send to each other is there on a mesh alone."""

    def collectives(family, name):
        target, drafters = tiny_models(family, 16, drafters=[name])
        [drafter] = drafters.values()
        state = DecodeState.empty(target, drafter, slots=2, capacity=32, block_length=2)
        options = DecodeOptions(block_length=2).resolve(drafter, 2)
        lowered = decode.lower(target, drafter, state, jnp.int32(1), options=options)
        return [name for name in COLLECTIVES if name in lowered.as_text()]

    assert not collectives("deepseek_v4", "deepseek_v4_dspark")
    with jax.set_mesh(make_mesh("data:2", jax.devices()[:2])):
        assert collectives("dense", "ngram") == ["all_reduce"]
