"""Rounds that pass over the vocabulary decode what those that write logits do.

On this machine by the references of the two ops; `tests/kernels` has their kernels.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from jaxspark.configs import drafters as draft_configs
from jaxspark.decoding import decode
from jaxspark.decoding import round as rounds
from jaxspark.drafters import DSparkDrafter
from jaxspark.exactness.audit import decode_requests
from jaxspark.generation import Request
from jaxspark.models import DenseDecoder
from jaxspark.parallel import vocabulary
from jaxspark.parallel.mesh import make_mesh
from jaxspark.settings import random_key
from pallas_kernels import Rows, verify
from pallas_kernels.draft_sampling import api as draft_api
from pallas_kernels.verify import api as verify_api
from tests import zoo

LENGTHS = (1, 17, 5)
OPTIONS = {"capacity": 96, "buckets": (len(LENGTHS) * (zoo.BLOCK + 1),)}
SAMPLED = [{"temperature": 1.0}, {"temperature": 0.7}, {"temperature": 1.3}]
MIXES = {
    "greedy": [{}, {}, {}],
    "sampled": SAMPLED,
    "mixed": [{"temperature": 1.0}, {}, {"temperature": 0.6}],
    "filtered": [{"temperature": 1.0, "top_p": 0.8}, {}, {"temperature": 0.6}],
    "told": [each | {"log_probs": True} for each in SAMPLED],
}


@pytest.fixture(scope="module")
def model():
    return zoo.target("llama")


@pytest.fixture
def both_ways(model, monkeypatch):
    """Decodes requests with logits written, then without; and counts the latter."""

    def both(name, coupling, mix):
        asked = [
            Request(prompt, max_new_tokens=16, seed=i, name=str(i), **settings)
            for i, (prompt, settings) in enumerate(
                zip(zoo.prompts(*LENGTHS), MIXES[mix], strict=True)
            )
        ]
        drafter, found = zoo.drafter(name, model), []
        for streams in (False, True):
            monkeypatch.setattr(rounds, "streams_vocabulary", lambda _, s=streams: s)
            decode.clear_cache()
            found.append(
                decode_requests(model, asked, drafter, coupling=coupling, **OPTIONS)
            )
        decode.clear_cache()
        return found

    return both


@pytest.mark.parametrize(
    ("name", "coupling", "mix"),
    [
        ("dspark-rnn", "rejection", "mixed"),
        ("dspark-rnn", "gumbel", "told"),
        pytest.param("dspark-pruned", "rejection", "told", marks=pytest.mark.long),
        ("dspark-pruned", "gumbel", "mixed"),
        pytest.param("dspark-vanilla", "rejection", "greedy", marks=pytest.mark.long),
        pytest.param("dspark-gated", "rejection", "filtered", marks=pytest.mark.long),
        ("hybrid", "rejection", "sampled"),
    ],
)
def test_tokens_rounds_and_log_probs_are_the_same(both_ways, name, coupling, mix):
    written, streamed = both_ways(name, coupling, mix)
    for one, other in zip(written, streamed, strict=True):
        assert one.tokens == other.tokens
        assert one.rounds == other.rounds
        if mix == "told":
            np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


@pytest.mark.parametrize(
    "coupling", [pytest.param("rejection", marks=pytest.mark.long), "gumbel"]
)
def test_simulated_kernels_change_no_token(coupling, monkeypatch):
    """One greedy request beside one that samples, in small tiles."""
    config = replace(zoo.TARGETS["llama"], hidden_size=128, num_hidden_layers=1)
    model = DenseDecoder(config, rngs=nnx.Rngs(0))
    model.embed_tokens.weight[...] *= 10.0
    options = {"depth": 1, "block_size": 2, "mask_token_id": 0, "markov_rank": 8}
    drafter = DSparkDrafter(draft_configs.dspark(config, **options), rngs=nnx.Rngs(1))
    asked = [
        Request([3, 5, 8], max_new_tokens=6, temperature=temperature, seed=1)
        for temperature in (0.0, 0.8)
    ]

    def decoded():
        decode.clear_cache()
        return [
            each.tokens
            for each in decode_requests(
                model, asked, drafter, coupling=coupling, capacity=32
            )
        ]

    expected, ran = decoded(), []
    monkeypatch.setattr(rounds, "streams_vocabulary", lambda _: True)
    for op in (verify_api, draft_api):
        kernel = op.IMPLEMENTATIONS["mosaic_tpu"]

        def run(*operands, kernel=kernel, **static):
            assert kernel.supports(*operands, **static) is None
            ran.append(kernel)
            return kernel.run(*operands, **static)

        replaced = {"xla": replace(kernel, run=run, platforms=())}
        monkeypatch.setattr(op, "IMPLEMENTATIONS", replaced)
    simulated = pltpu.InterpretParams(uninitialized_memory="nan")
    with pltpu.force_tpu_interpret_mode(simulated):
        assert decoded() == expected
    decode.clear_cache()
    assert len(set(map(id, ran))) == 2


@pytest.mark.parametrize("noisy", [True, False])
def test_shards_of_the_vocabulary_draw_as_one(noisy):
    hidden_TD = jax.random.normal(random_key(0), (12, 8))
    head_VD = jax.random.normal(random_key(3), (64, 8))
    keys_R2 = jnp.arange(24, dtype=jnp.int32).reshape(12, 2)
    temperature_R = jnp.tile(jnp.array([0.0, 0.5, 1.0, 2.0]), 3)
    rows = Rows(temperature_R, keys_R2 if noisy else None)

    def drawn(hidden_TD, head_VD, rows):
        first = vocabulary.first(len(head_VD))
        draws = verify(hidden_TD, head_VD, rows, first=first)
        return vocabulary.united(draws, rows, first)

    whole = drawn(hidden_TD, head_VD, rows)
    mesh = make_mesh("model:2", jax.devices()[:2])
    shared = jax.shard_map(
        drawn,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("model"), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    seen = jax.jit(shared)(hidden_TD, head_VD, rows)
    assert seen.place_R.tolist() == whole.place_R.tolist()
    assert max(seen.place_R) >= 32 > min(seen.place_R)
    for one, other in zip(jax.tree.leaves(seen), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
