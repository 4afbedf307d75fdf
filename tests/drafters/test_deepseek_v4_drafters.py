"""DeepSeek-V4's drafters against what their equations say, by other code."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspark.configs.drafters import deepseek_v4_dspark
from jaxspark.configs.targets import deepseek_v4_tiny
from jaxspark.drafters import DeepSeekV4DSpark, DraftContext, MTPDrafter
from jaxspark.drafters.heads import ConfidenceHead
from jaxspark.models import DeepSeekV4, FlatTokens
from jaxspark.models.deepseek_v4 import member
from jaxspark.models.layers.rope import TrailingRotation
from jaxspark.training.deepseek_v4 import forward
from tests.driver import Sampler, Session

CONFIG = replace(deepseek_v4_tiny(61), hc_sinkhorn_iters=3)
G, WINDOW, D = 5, CONFIG.sliding_window, CONFIG.hidden_size


@pytest.fixture(scope="module")
def model():
    model = DeepSeekV4(CONFIG, rngs=nnx.Rngs(0))
    model.embed_tokens.weight[...] *= 30.0
    return model


def one_text(ids, start=0, count=None):
    """A pass of one slot."""
    count = len(ids) if count is None else count
    return FlatTokens.from_rows(
        jnp.asarray(ids)[None], jnp.array([start]), jnp.array([count])
    )


@jax.jit
def drafted(drafter, model, taps_mDS, count, anchor):
    """Hidden states of a block behind the first `count` context rows."""
    rows = one_text(jnp.zeros(taps_mDS.shape[-1], jnp.int32), count=count)
    cache = drafter.observe(drafter.init_cache(1, 64), taps_mDS, rows)
    return drafter.backbone(model, cache, anchor[None], count[None], G)[:, 0]


def turned(count, start=0):
    positions = start + jnp.arange(count)
    return TrailingRotation.at(CONFIG.rope, CONFIG.qk_rope_head_dim, positions)


def by_numpy(attention, h_DG, context_Dn):
    """Attention of a block behind n context rows: the last W of them and itself."""
    n = context_Dn.shape[1]
    own = turned(G, n)
    latent = attention.q_a_norm(attention.q_a_proj(h_DG))
    q_GNH = np.asarray(attention.queries(latent, own))
    keys_rH = np.asarray(attention.keys(h_DG, own))
    if n:
        before = np.asarray(attention.keys(context_Dn, turned(n)))
        keys_rH = np.concatenate([before[-WINDOW:], keys_rH])
    scores = np.einsum("gnh,rh->gnr", q_GNH, keys_rH) * CONFIG.head_dim**-0.5
    weights = np.exp(scores)
    sinks = np.exp(np.asarray(attention.sinks[...]))[:, None]
    weights /= weights.sum(-1, keepdims=True) + sinks
    o_NHG = np.einsum("gnr,rh->nhg", weights, keys_rH)
    o_NHG = np.asarray(own.inverse(jnp.asarray(o_NHG)))
    groups = o_NHG.reshape(CONFIG.o_groups, -1, G)
    w_gRI = np.asarray(attention.o_a_proj.matrix)
    w_gRI = w_gRI.reshape(CONFIG.o_groups, -1, groups.shape[1])
    low = np.einsum("gri,git->grt", w_gRI, groups).reshape(-1, G)
    return attention.o_b_proj(jnp.asarray(low))


@pytest.mark.parametrize("count", [0, 3, WINDOW - 1, WINDOW, 20, 3 * WINDOW])
def test_a_block_attends_as_the_equations_say(model, count):
    """It begins one past the newest context row, sees W of them and all of itself."""
    drafter = DeepSeekV4DSpark(deepseek_v4_dspark(CONFIG), rngs=nnx.Rngs(1))
    drafter.stages.self_attn.sinks[...] += 0.5
    random = np.random.default_rng(count)
    taps_mDS = jnp.asarray(random.normal(size=(3, D, 3 * WINDOW)), jnp.float32)
    anchor, noise = 7, drafter.config.dspark_noise_token_id
    seen_DG = drafted(drafter, model, taps_mDS, jnp.int32(count), jnp.int32(anchor))

    taps_mDn = taps_mDS[..., :count]
    context = drafter.main_norm(drafter.main_proj(taps_mDn.reshape(3 * D, count)))
    ids = np.array([anchor] + [noise] * (G - 1))
    x_MDG = jnp.broadcast_to(model.embed(ids), (CONFIG.hc_mult, D, G))
    for place in map(jnp.int32, range(3)):
        stage = member(drafter.stages, place)

        def attend(h_DG, stage=stage):
            return by_numpy(stage.self_attn, h_DG, context), None

        x_MDG, _, _ = stage.around(attend, x_MDG, place, one_text(ids, count))
    np.testing.assert_allclose(seen_DG, drafter.hc_head(x_MDG), atol=1e-4)


def test_confidences_are_not_rounded_to_bfloat16():
    head = ConfidenceHead(64, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    features = np.random.default_rng(0).normal(size=(64, 200))
    features_IB = jnp.asarray(features, jnp.bfloat16)
    seen_B = head(features_IB)
    assert seen_B.dtype == jnp.float32
    weight = np.asarray(head.proj.weight[...], np.float64)
    expected_B = (weight @ np.asarray(features_IB, np.float64))[0]
    np.testing.assert_allclose(seen_B, expected_B, rtol=1e-4, atol=1e-5)


def logits_of(drafter, model, cache, ids, length):
    """Logits of the first draft behind `length` tokens, the last not yet processed."""
    seen = []

    def draw(logits_BV, j, ids_W):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), logits_BV)
        best_B = jnp.argmax(logits_BV, -1).astype(jnp.int32)
        return best_B, logits_BV, logits_BV[:, 0]

    tokens_BS = jnp.zeros((1, 64), jnp.int32).at[0, : len(ids)].set(jnp.asarray(ids))
    context = DraftContext.of(tokens_BS, jnp.array([length]))
    drafter.propose(model, cache, context, Sampler(draw), 1)
    jax.effects_barrier()
    return seen[0][0]


@pytest.mark.parametrize("chunk", [7, 40])
def test_mtp_drafts_what_its_training_forward_says(model, chunk):
    """From a cache filled in chunks, and of the whole text at once."""
    drafter = MTPDrafter(CONFIG, rngs=nnx.Rngs(1))
    ids = np.random.default_rng(0).integers(0, 61, 40)
    whole = one_text(ids)
    streams_MDT, _ = jax.jit(forward)(model, whole)
    next_T = jnp.asarray(np.roll(ids, -1))
    expected_TV, _ = drafter.of_whole(model, streams_MDT, next_T, whole)

    session = Session(model, 1, 64, taps=drafter.taps)
    [taps_mtD] = session.feed([ids[:39]], chunk=chunk)[1]
    taps_mDt, cache = jnp.moveaxis(taps_mtD, 1, 2), drafter.init_cache(1, 64)
    observe = jax.jit(lambda *arguments: drafter.observe(*arguments))
    for start in range(0, 39, chunk):
        part = slice(start, min(start + chunk, 39))
        cache = observe(cache, taps_mDt[..., part], one_text(ids[part], start))
    seen_V = logits_of(drafter, model, cache, ids, 40)
    # The pair of position 38 and token 39 predicts token 40.
    np.testing.assert_allclose(seen_V, expected_TV[38], atol=1e-3)
    assert np.abs(expected_TV[38] - expected_TV[37]).max() > 0.1
