"""Training DeepSeek-V4: gradients, documents apart, losses, loads that even out."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.test_util import check_grads

from jaxspark.configs.targets import deepseek_v4_tiny
from jaxspark.drafters import MTPDrafter
from jaxspark.models import DeepSeekV4, FlatTokens
from jaxspark.models.deepseek_v4 import (
    DeepSeekV4Layer,
    ForwardContext,
    from_the_start,
)
from jaxspark.models.layers.compression import Compressor
from jaxspark.models.layers.experts import MixtureOfExperts, Routing
from jaxspark.models.layers.hyper_connections import HyperConnection, HyperHead
from jaxspark.models.layers.indexer import Indexer
from jaxspark.models.layers.sparse_attention import SparseAttention
from jaxspark.training.deepseek_v4 import (
    forward,
    imbalance,
    index_loss,
    load_and_balance,
    pretraining_loss,
    scores_of,
    update_router_bias,
)
from pallas_kernels import hyper_mix
from pallas_kernels.rings import in_order
from tests.driver import Session

VOCAB = 29
SMALL = replace(
    deepseek_v4_tiny(VOCAB),
    hidden_size=12,
    moe_intermediate_size=6,
    num_attention_heads=2,
    head_dim=8,
    qk_rope_head_dim=4,
    q_lora_rank=6,
    o_lora_rank=4,
    n_routed_experts=4,
    index_n_heads=3,
    index_head_dim=4,
    index_topk=2,
    sliding_window=4,
    hca_ratio=8,
    hc_sinkhorn_iters=3,
    compress_ratios=(0, 4, 8),
)


def texts(*lengths, seed=0):
    """One text per slot, padded to the longest."""
    random = np.random.default_rng(seed)
    ids_BQ = random.integers(0, VOCAB, (len(lengths), max(lengths)))
    zeros = jnp.zeros(len(lengths), jnp.int32)
    return FlatTokens.from_rows(jnp.asarray(ids_BQ), zeros, jnp.array(lengths))


def lively(module, seed=0):
    """All parameters random and in float64, nothing at a neutral value."""
    random = np.random.default_rng(seed)

    def draw(x):
        if jnp.issubdtype(x.dtype, jnp.integer):
            return x
        return jnp.asarray(0.7 * random.normal(size=x.shape), jnp.float64)

    return jax.tree.map(draw, module)


def blocks():
    """Every block, how it is made and as a function of itself and input, by name."""
    rngs, c = nnx.Rngs(0), SMALL
    options = {"dtype": jnp.float64, "rngs": rngs}
    tokens = texts(13, 9)
    T, D, M = len(tokens.ids_T), c.hidden_size, c.hc_mult
    context = ForwardContext.of(c, tokens)
    zero = jnp.int32(0)

    def hyper(part, x):
        h_TD, post, comb = part(x.reshape(T, M, D))
        return hyper_mix(jnp.tanh(h_TD), x.reshape(T, M, D), post, comb)

    def scores(part, x):
        x_TD, latent_TR = x[:, :D], x[:, D : D + c.q_lora_rank]
        keys = compressed(part.compressor, x_TD)
        return scores_of(part(x_TD, latent_TR, keys, context.plain), tokens)

    def compressed(part, x_TD):
        size = (1, tokens.slots, tokens.rows)
        pending, entries = (
            part.init_pending(*size),
            part.init_entries(*size, jnp.float64),
        )
        return part(x_TD, pending, entries, zero, tokens)[1].table(zero)

    def compress(part, x):
        return compressed(part, x[:, :D]).whole()

    def attend(part, x):
        cache = part.init_cache(1, tokens.slots, tokens.rows, jnp.float64)
        return part(x[:, :D], cache, zero, tokens, context.compressed)[0]

    def layer(part, x):
        return from_the_start(part, x.reshape(T, M, D), context)[0]

    def experts(part, x):
        return part(x[:, :D], tokens.ids_T, tokens.slots_T, zero)[0]

    def head(part, x):
        return part(x.reshape(T, M, D))

    compressor = partial(Compressor, c, c.head_dim, **options)
    attention = partial(SparseAttention, c, **options)
    mixture = partial(MixtureOfExperts, c, **options)
    return {
        "hyper-connection": (partial(HyperConnection, c, rngs=rngs), hyper),
        "hyper head": (partial(HyperHead, c, rngs=rngs), head),
        "compression, overlapping": (partial(compressor, 4, overlap=True), compress),
        "compression": (partial(compressor, 8, overlap=False), compress),
        "indexer": (partial(Indexer, c, **options), scores),
        "window attention": (partial(attention, 0), attend),
        "CSA": (partial(attention, 4), attend),
        "HCA": (partial(attention, 8), attend),
        "experts": (partial(mixture, hashed=False), experts),
        "hashed experts": (partial(mixture, hashed=True), experts),
        "layer": (partial(DeepSeekV4Layer, c, 0, False, **options), layer),
    }


@pytest.mark.parametrize("name", [
    "hyper-connection", "hyper head", "compression, overlapping", "compression",
    "indexer", "window attention", "CSA", "HCA", "experts", "hashed experts", "layer",
])  # fmt: skip
def test_gradients_equal_finite_differences(name):
    """In float64, along random directions of all parameters and of the input."""
    with jax.enable_x64(True):
        make, function = blocks()[name]
        graph, state = nnx.split(lively(make()))
        leaves, tree = jax.tree.flatten(state)
        moving = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
        x = jnp.asarray(np.random.default_rng(1).normal(size=(26, SMALL.hc_mult * 12)))

        @jax.jit
        def loss(parts, x):
            parts = iter(parts)
            filled = [next(parts) if m else leaf for m, leaf in zip(moving, leaves)]
            out = function(nnx.merge(graph, jax.tree.unflatten(tree, filled)), x)
            weight = np.random.default_rng(2).normal(size=out.shape)
            return jnp.sum(jnp.where(jnp.isfinite(out), out, 0.0) * weight)

        parts = [leaf for m, leaf in zip(moving, leaves) if m]
        check_grads(loss, (parts, x), 1, ["rev"], atol=1e-5, rtol=1e-5, eps=1e-6)


@pytest.mark.long
def test_the_training_forward_is_the_models():
    """Whole texts give the logits of prefill."""
    model = DeepSeekV4(SMALL, rngs=nnx.Rngs(0))
    model.embed_tokens.weight[...] *= 30.0
    tokens = texts(37, 20, 5)
    x_TMD, _ = jax.jit(forward)(model, tokens)
    seen = tokens.padded(model.logits(model.hc_head(x_TMD)), 0.0)
    rows = [np.asarray(tokens.ids_T[tokens.slots_T == slot]) for slot in range(3)]
    expected = Session(model, 3, 48).feed(rows)[0]
    for slot, theirs in enumerate(expected):
        np.testing.assert_allclose(seen[slot, : len(theirs)], theirs, atol=1e-4)


def test_documents_do_not_see_each_other():
    model = DeepSeekV4(SMALL, rngs=nnx.Rngs(0))
    model.embed_tokens.weight[...] *= 30.0
    one, other = texts(37, 20, 5, seed=1), texts(37, 20, 5, seed=2)
    ids_T = jnp.where(one.slots_T == 0, one.ids_T, other.ids_T)
    mixed = replace(one, ids_T=ids_T)
    first, second = (jax.jit(forward)(model, each)[0] for each in (one, mixed))
    slots_T = np.asarray(one.slots_T)
    mine, others = slots_T == 0, slots_T > 0
    np.testing.assert_allclose(first[mine], second[mine], atol=1e-5)
    assert np.abs(first[others] - second[others]).max() > 1e-2


@pytest.mark.long
def test_the_indexers_loss_reaches_the_indexer_alone():
    model = DeepSeekV4(replace(SMALL, compress_ratios=(4,)), rngs=nnx.Rngs(0))
    model.embed_tokens.weight[...] *= 30.0
    tokens = texts(30, 22)

    @partial(jax.jit, static_argnames=("dense",))
    @partial(jax.value_and_grad, allow_int=True)
    def loss_and_gradients(model, dense):
        _, reports = forward(model, tokens, dense_index=dense)
        return sum(each.index_L.sum() for each in reports)

    for dense in (True, False):
        loss, grads = loss_and_gradients(model, dense=dense)
        for path, value in nnx.to_flat_state(nnx.split(grads)[1]):
            array = value.get_value()
            if array.dtype == jax.dtypes.float0:
                continue
            moved = float(jnp.abs(array).max()) > 0
            assert moved == ("indexer" in path), path
        assert loss > 0


def test_an_indexer_that_says_what_attention_does_has_no_loss():
    """Scores equal to the log of attention's mass on entries: divergence 0."""
    with jax.enable_x64(True):
        attention = lively(
            SparseAttention(SMALL, 4, dtype=jnp.float64, rngs=nnx.Rngs(0))
        )
        tokens = texts(24)
        rotation = ForwardContext.of(SMALL, tokens).compressed
        x_TD = jnp.asarray(np.random.default_rng(0).normal(size=(24, 12)))
        cache = attention.init_cache(1, 1, 24, jnp.float64)
        attend = partial(attention, tokens=tokens, rotation=rotation)
        _, _, inputs = jax.jit(attend)(x_TD, cache, jnp.int32(0))
        q = tokens.padded(attention.queries(inputs.latent_TR, rotation), 0)
        entries = inputs.entries.table.whole()
        scale = SMALL.head_dim**-0.5
        dots = scale * np.einsum("bqnh,bch->bqnc", q, entries)
        before = in_order(inputs.before, tokens)
        recent = np.concatenate([before, inputs.keys_TH[None]], axis=1)
        near = scale * np.einsum("bqnh,brh->bqnr", q, recent)
        row, query = np.arange(near.shape[-1]), np.arange(24)[:, None]
        seen = (row >= np.maximum(query, 3)) & (row <= query + 3)  # 3 rows before 0
        open_ = np.arange(entries.shape[1]) < (np.arange(24)[:, None] + 1) // 4
        total = (np.exp(near) * seen[:, None]).sum(-1)
        total += np.exp(np.asarray(attention.sinks[...]))
        total += (np.exp(dots) * open_[:, None]).sum(-1)
        mass = (np.exp(dots) / total[..., None]).sum(2)
        loss = partial(index_loss, attention, inputs, tokens=tokens, rotation=rotation)
        loss = jax.jit(loss, static_argnames="dense")
        assert abs(loss(jnp.asarray(np.log(mass[0])), dense=True)) < 1e-9
        assert loss(scores_of(inputs.entries.index, tokens), dense=True) > 1e-3


def test_balance_is_one_when_even_and_grows_with_skew():
    tokens = texts(8, 8)

    def routing(experts_TX, scores_TE):
        weights = jnp.ones(experts_TX.shape)
        return Routing(experts_TX, weights, scores_TE)

    even = jnp.stack([jnp.arange(16) % 4, (jnp.arange(16) + 1) % 4], axis=1)
    load_E, balance = load_and_balance(routing(even, jnp.ones((16, 4))), tokens)
    assert load_E.tolist() == [8.0] * 4
    np.testing.assert_allclose(balance, 1.0, rtol=1e-6)
    skewed = jnp.tile(jnp.array([0, 1]), (16, 1))
    scores = jnp.tile(jnp.array([9.0, 9.0, 1.0, 1.0]), (16, 1))
    load_E, balance = load_and_balance(routing(skewed, scores), tokens)
    assert load_E.tolist() == [16.0, 16.0, 0.0, 0.0]
    np.testing.assert_allclose(balance, 2 * 0.9, rtol=1e-6)


@pytest.mark.long
def test_a_short_run_learns_and_evens_out_loads():
    """Loss falls, and the most loaded expert gets below 1.5 times the mean."""
    config = replace(
        deepseek_v4_tiny(VOCAB),
        hidden_size=64,
        compress_ratios=(0, 4),
        hc_sinkhorn_iters=3,
    )
    model = DeepSeekV4(config, rngs=nnx.Rngs(0))
    mtp = MTPDrafter(config, rngs=nnx.Rngs(1))
    skew = jnp.linspace(0.05, -0.05, config.n_routed_experts)
    for stack in model.layers[1:]:
        stack.mlp.gate.e_score_correction_bias[...] += skew
    mtp.stages.mlp.gate.e_score_correction_bias[...] += skew
    optimizer = optax.adam(3e-3)
    graph, params, rest = nnx.split((model, mtp), nnx.Param, ...)
    state = optimizer.init(params)

    @jax.jit
    def step(params, rest, state, tokens):
        def loss(params):
            model, mtp = nnx.merge(graph, params, rest)
            return pretraining_loss(model, tokens, mtp)

        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        model, mtp = nnx.merge(graph, optax.apply_updates(params, updates), rest)
        model = update_router_bias(model, metrics.stats, speed=4e-3)
        mtp = update_router_bias(mtp, (metrics.mtp_stats,), speed=4e-3)
        _, params, rest = nnx.split((model, mtp), nnx.Param, ...)
        return params, rest, state, metrics

    random = np.random.default_rng(0)
    seen = []
    for _ in range(40):
        # Texts that count up by a step of their own.
        first, by = random.integers(0, VOCAB, (2, 8, 1))
        ids_BQ = (first + (1 + by % 5) * np.arange(48)) % VOCAB
        tokens = FlatTokens.from_rows(
            jnp.asarray(ids_BQ), jnp.zeros(8, jnp.int32), jnp.full(8, 48)
        )
        params, rest, state, metrics = step(params, rest, state, tokens)
        seen.append(metrics)
    start, end = _together(seen[:5]), _together(seen[-5:])
    print(f"cross entropy, MTP, max/mean load: {start} -> {end}")
    assert end[0] < 0.6 * start[0]
    assert end[1] < 0.9 * start[1]
    assert start[2] > 2.5
    assert end[2] < 1.5


def _together(steps):
    """Mean losses of some steps, and the imbalance of their loads in sum."""
    stats = [(*m.stats[1:], m.mtp_stats) for m in steps]
    total = jax.tree.map(lambda *each: sum(each), *stats)
    entropy = np.mean([float(m.cross_entropy) for m in steps])
    mtp = np.mean([float(m.mtp) for m in steps])
    return float(entropy), float(mtp), float(imbalance(total))
