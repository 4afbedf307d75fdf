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
from jaxspark.models.deepseek_v4 import select_layer
from jaxspark.models.layers.rope import PartialRotation
from jaxspark.training.deepseek_v4 import forward
from tests.driver import Sampler, Session, greedy_draw

CONFIG = replace(
    deepseek_v4_tiny(61), compress_ratios=(0, 4, 32, 4, 32), hc_sinkhorn_iters=3
)
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
def drafted(drafter, model, taps_SmD, count, anchor):
    """Hidden states of a block behind the first `count` context rows."""
    rows = one_text(jnp.zeros(len(taps_SmD), jnp.int32), count=count)
    cache = drafter.observe(drafter.init_cache(1, 64), taps_SmD, rows)
    return drafter.backbone(model, cache, anchor[None], count[None], G)[0]


def turned(count, start=0):
    positions = start + jnp.arange(count)
    return PartialRotation.at(CONFIG.rope, CONFIG.qk_rope_head_dim, positions)


def by_numpy(attention, h_GD, context_nD):
    """Attention of a block behind n context rows: the last W of them and itself."""
    n = len(context_nD)
    own = turned(G, n)
    latent = attention.q_a_norm(attention.q_a_proj(h_GD))
    q_GNH = np.asarray(attention.queries(latent, own))
    keys_rH = np.asarray(attention.keys(h_GD, own))
    if n:
        before = np.asarray(attention.keys(context_nD, turned(n)))
        keys_rH = np.concatenate([before[-WINDOW:], keys_rH])
    scores = np.einsum("gnh,rh->gnr", q_GNH, keys_rH) * CONFIG.head_dim**-0.5
    weights = np.exp(scores)
    sinks = np.exp(np.asarray(attention.sinks[...]))[:, None]
    weights /= weights.sum(-1, keepdims=True) + sinks
    o_GNH = np.einsum("gnr,rh->gnh", weights, keys_rH)
    o_GNH = np.asarray(own.inverse(jnp.asarray(o_GNH)))
    groups = o_GNH.reshape(G, CONFIG.o_groups, -1)
    w_gRI = np.asarray(attention.o_a_proj.matrix)
    w_gRI = w_gRI.reshape(CONFIG.o_groups, -1, groups.shape[-1])
    low = np.einsum("gri,tgi->tgr", w_gRI, groups).reshape(G, -1)
    return attention.o_b_proj(jnp.asarray(low))


@pytest.mark.parametrize("count", [0, 3, WINDOW, 3 * WINDOW])
def test_a_block_attends_as_the_equations_say(model, count):
    """It begins one past the newest context row, sees W of them and all of itself."""
    drafter = DeepSeekV4DSpark(deepseek_v4_dspark(CONFIG), rngs=nnx.Rngs(1))
    drafter.stages.self_attn.sinks[...] += 0.5
    random = np.random.default_rng(count)
    taps_SmD = jnp.asarray(random.normal(size=(3 * WINDOW, 3, D)), jnp.float32)
    anchor, noise = 7, drafter.config.dspark_noise_token_id
    seen_GD = drafted(drafter, model, taps_SmD, jnp.int32(count), jnp.int32(anchor))

    taps_nmD = taps_SmD[:count]
    context = drafter.main_norm(drafter.main_proj(taps_nmD.reshape(count, 3 * D)))
    ids = np.array([anchor] + [noise] * (G - 1))
    x_GMD = model.streams(model.embed(ids))
    for place in map(jnp.int32, range(3)):
        stage = select_layer(drafter.stages, place)

        def attend(h_GD, stage=stage):
            return by_numpy(stage.self_attn, h_GD, context), None

        x_GMD, _, _ = stage.apply_sublayers(attend, x_GMD, place, one_text(ids, count))
    np.testing.assert_allclose(seen_GD, drafter.hc_head(x_GMD), atol=1e-4)


def test_confidences_are_not_rounded_to_bfloat16():
    head = ConfidenceHead(64, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    features = np.random.default_rng(0).normal(size=(200, 64))
    features_BI = jnp.asarray(features, jnp.bfloat16)
    seen_B = head(features_BI)
    assert seen_B.dtype == jnp.float32
    weight = np.asarray(head.proj.weight[...], np.float64)
    expected_B = np.asarray(features_BI, np.float64) @ weight[0]
    np.testing.assert_allclose(seen_B, expected_B, rtol=1e-4, atol=1e-5)


def logits_of(drafter, model, cache, ids, length):
    """Logits of the first draft behind `length` tokens, the last not yet processed."""
    tokens_BS = jnp.zeros((1, 64), jnp.int32).at[0, : len(ids)].set(jnp.asarray(ids))
    context = DraftContext.of(tokens_BS, jnp.array([length]))

    @jax.jit
    def propose(drafter, model, cache):
        return drafter.propose(model, cache, context, Sampler(greedy_draw), 1)[0]

    return propose(drafter, model, cache).q.log_q_BGW[0, 0]


@pytest.mark.long
def test_mtp_drafts_what_its_training_forward_says(model, chunk=7):
    """From a cache filled in chunks, and of the whole text at once."""
    drafter = MTPDrafter(CONFIG, rngs=nnx.Rngs(1))
    ids = np.random.default_rng(0).integers(0, 61, 40)
    whole = one_text(ids)
    streams_TMD, _ = jax.jit(forward)(model, whole)
    next_T = jnp.asarray(np.roll(ids, -1))
    expected_TV, _ = jax.jit(lambda *arguments: drafter.logits(*arguments))(
        model, streams_TMD, next_T, whole
    )

    session = Session(model, 1, 64, taps=drafter.taps)
    [taps_mtD] = session.feed([ids[:39]], chunk=chunk)[1]
    taps_tmD, cache = jnp.moveaxis(taps_mtD, 0, 1), drafter.init_cache(1, 64)
    observe = jax.jit(lambda *arguments: drafter.observe(*arguments))
    for start in range(0, 39, chunk):
        part = slice(start, min(start + chunk, 39))
        cache = observe(cache, taps_tmD[part], one_text(ids[part], start))
    seen_V = logits_of(drafter, model, cache, ids, 40)
    # The pair of position 38 and token 39 predicts token 40.
    np.testing.assert_allclose(seen_V, expected_TV[38], atol=1e-3)
    assert np.abs(expected_TV[38] - expected_TV[37]).max() > 0.1
