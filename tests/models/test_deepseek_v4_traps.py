"""The traps of DeepSeek-V4 implementations, one test each, in the reference's order."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspark.checkpoints.deepseek_v4 import load_deepseek_v4
from jaxspark.checkpoints.deepseek_v4_config import v4_config_from_hf, v4_config_to_hf
from jaxspark.checkpoints.tree import Tensors
from jaxspark.configs.drafters import deepseek_v4_dspark
from jaxspark.configs.targets import (
    deepseek_v4_flash,
    deepseek_v4_pro,
    deepseek_v4_tiny,
)
from jaxspark.decoding import Sampling, init_state
from jaxspark.decoding.options import check_block_length
from jaxspark.drafters import DeepSeekV4DSpark, DraftContext, MTPDrafter, NgramDrafter
from jaxspark.models import DeepSeekV4, FlatTokens
from jaxspark.models.layers.compression import Compressor
from jaxspark.models.layers.experts import Experts, Router
from jaxspark.models.layers.mlp import GatedMLP
from jaxspark.models.layers.rope import PartialRotation
from pallas_kernels import Table, hyper_mix, index_scores, sparse_attention, top_k
from pallas_kernels.hyper_connections.ref import sinkhorn
from tests.driver import Sampler, Session, greedy_draw
from tests.parity.v4_cases import lengths, random_config
from tests.parity.v4_weights import random_weights

VOCAB = 61
TINY = replace(deepseek_v4_tiny(VOCAB), hc_sinkhorn_iters=3)
FLASH_ROPE = deepseek_v4_flash().compress_rope
RANDOM = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


def model_of(*ratios, **changes):
    """A model of a few layers with lively embeddings."""
    config = replace(TINY, compress_ratios=ratios, **changes)
    model = DeepSeekV4(config, rngs=nnx.Rngs(0))
    model.embed_tokens.weight[...] *= 30.0
    return model


def one_slot(count, start=0):
    """Tokens of a single slot."""
    return FlatTokens.from_rows(
        jnp.zeros((1, count), jnp.int32), jnp.array([start]), jnp.array([count])
    )


def logits(model, row):
    """Passes of one size, so that texts of all lengths share a model's program."""
    return Session(model, 1, 160).feed([row], chunk=40)[0][0]


def ids(count, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, count)


def test_01_streams_are_mixed_by_the_transposed_matrix():
    x_TMD = normal(2, 3, 4)
    comb_TMM = jnp.zeros((2, 3, 3)).at[:, 0, 1].set(1.0)
    mixed = hyper_mix(jnp.zeros((2, 4)), x_TMD, jnp.zeros((2, 3)), comb_TMM)
    np.testing.assert_allclose(mixed[:, 1], x_TMD[:, 0])
    assert not np.any(mixed[:, 0]) and not np.any(mixed[:, 2])


def test_02_sinkhorn_begins_with_softmax_and_ends_on_columns():
    logits_TMM, eps = np.asarray(normal(3, 4, 4)), 0.1
    expected = np.exp(logits_TMM - logits_TMM.max(2, keepdims=True))
    expected = expected / expected.sum(2, keepdims=True) + eps
    for step in range(2 * 20 - 1):
        axis = 1 + step % 2  # columns (over j) first and last
        expected = expected / (expected.sum(axis, keepdims=True) + eps)
    seen = sinkhorn(jnp.asarray(logits_TMM), 20, eps)
    np.testing.assert_allclose(seen, expected, rtol=1e-5)
    released = sinkhorn(jnp.asarray(logits_TMM), 20, TINY.hc_eps)
    np.testing.assert_allclose(released.sum(1), 1, atol=2e-6)


@pytest.mark.parametrize("preset", [deepseek_v4_flash, deepseek_v4_pro])
def test_03_yarn_does_not_scale_cos_and_sin(preset):
    config = preset()
    turn = PartialRotation.at(config.compress_rope, 64, jnp.array([0, 5, 99999]))
    np.testing.assert_allclose(turn.cos_Th**2 + turn.sin_Th**2, 1, rtol=1e-5)
    # The ramp between kept and stretched frequencies runs over pairs 15 to 25.
    plain = 160000.0 ** (-np.arange(32) / 32)
    ratio = config.compress_rope.frequencies(64)[0] / plain
    stretched = np.clip((np.arange(32) - 15) / 10, 0, 1)
    np.testing.assert_allclose(ratio, 1 - stretched * 15 / 16, rtol=1e-4)


def test_03_a_rope_that_scales_is_refused():
    """The default of YaRN's attention factor is not 1."""
    with pytest.raises(ValueError, match="compress_rope scales cos and sin by 1.277"):
        replace(TINY, compress_rope=replace(FLASH_ROPE, attention_factor=None))


@pytest.mark.parametrize("ratio", [0, 4])
def test_04_layers_with_entries_turn_by_a_rope_of_their_own(ratio):
    """Each of the two ropes matters to its layers, and to no others."""
    row = ids(3)  # no entry is complete
    plain = logits(model_of(ratio), row)
    for name, matters in (("rope", ratio == 0), ("compress_rope", ratio > 0)):
        changed = replace(getattr(TINY, name), rope_theta=100.0)
        other = logits(model_of(ratio, **{name: changed}), row)
        assert (np.abs(plain - other).max() > 1e-3) == matters


@pytest.mark.parametrize("kind", ["dspark", "mtp"])
def test_04_drafters_turn_by_the_rope_of_layers_without_entries(kind):
    model = model_of(4, num_hash_layers=0)

    def seen(config):
        if kind == "mtp":
            drafter = MTPDrafter(config, rngs=nnx.Rngs(1))
        else:
            drafter = DeepSeekV4DSpark(deepseek_v4_dspark(config), rngs=nnx.Rngs(1))
        return proposals(drafter, model).q.log_q_BGW

    plain = seen(model.config)
    for name, matters in (("rope", True), ("compress_rope", False)):
        changed = replace(getattr(TINY, name), rope_theta=50.0)
        other = seen(replace(model.config, **{name: changed}))
        assert (np.abs(plain - other).max() > 1e-4) == matters, name


@pytest.mark.parametrize("overlap", [True, False])
def test_05_entries_turn_by_the_first_position_of_their_window(overlap):
    """Of constant values every entry is the same but for its angle, m i."""
    config, m = TINY, 4
    part = Compressor(
        config, 32, m, overlap=overlap, dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    tokens = FlatTokens.from_rows(
        jnp.zeros((1, 16), jnp.int32), jnp.zeros(1, jnp.int32), jnp.array([16])
    )
    x_TD = jnp.broadcast_to(normal(config.hidden_size), (16, config.hidden_size))
    if overlap:  # the same values in both series
        half = part.kv_proj.weight[...][:32]
        part.kv_proj.weight[...] = jnp.concatenate([half, half])
    pending, entries = (
        part.init_pending(1, 1, 16),
        part.init_entries(1, 1, 16, jnp.float32),
    )
    _, entries = part(x_TD, pending, entries, jnp.int32(0), tokens)
    plain_1H = part.kv_norm(part.kv_proj(x_TD[:1])[:, :32])
    turn = PartialRotation.at(config.compress_rope, 16, m * jnp.arange(4))
    expected_CH = turn(jnp.broadcast_to(plain_1H, (4, 32))[:, None])[:, 0]
    np.testing.assert_allclose(entries.rows_LBSH[0, 0], expected_CH, atol=1e-5)


def test_06_what_is_read_depends_on_distances_alone():
    """Keys are values, so outputs are turned back; else positions would show."""
    model, end = model_of(0, num_hash_layers=0), ids(40, 1)
    early = logits(model, np.concatenate([ids(2), end]))[-1]
    late = logits(model, np.concatenate([ids(77, 2), end]))[-1]
    np.testing.assert_allclose(early, late, atol=1e-3)


def test_07_the_shared_expert_is_clamped_too():
    part = GatedMLP(8, 16, bias=False, limit=2.0, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x_TD = 1000.0 * normal(20, 8)
    gate, up = part.gate_proj(x_TD), part.up_proj(x_TD)
    expected = jax.nn.silu(jnp.minimum(gate, 2.0)) * jnp.clip(up, -2.0, 2.0)
    np.testing.assert_allclose(part.hidden(x_TD), expected, rtol=1e-5)
    assert np.abs(part.hidden(x_TD)).max() <= 2 * float(jax.nn.silu(2.0)) + 1e-5
    tiny = DeepSeekV4(TINY, rngs=nnx.Rngs(0)).layers[0].mlp
    assert tiny.shared_experts.limit == tiny.experts.limit == TINY.swiglu_limit


@pytest.mark.parametrize("ratio", [0, 4, 32])
def test_08_no_query_sees_the_future(ratio):
    row = ids(70)
    model = model_of(ratio)
    plain = logits(model, row)
    for place in (31, 32, 63, 66):
        changed = row.copy()
        changed[place] = (changed[place] + 1) % VOCAB
        seen = logits(model, changed)
        np.testing.assert_allclose(seen[:place], plain[:place], atol=1e-4)
        assert np.abs(seen[place] - plain[place]).max() > 1e-2


@pytest.mark.parametrize("hashed", [True, False])
def test_09_the_router_survives_extreme_scores(hashed):
    """softplus neither overflows nor makes 0 / 0 of scores that all vanish."""
    part = Router(TINY, hashed=hashed, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    for factor in (-1e4, 1e4):
        part.weight[...] = jnp.full(part.weight.shape, factor, jnp.bfloat16)
        routing = part(jnp.ones((3, TINY.hidden_size), jnp.bfloat16), jnp.arange(3))
        assert routing.scores_TE.dtype == jnp.float32
        assert np.isfinite(routing.weights_TX).all()
    part.weight[...] = normal(*part.weight.shape).astype(jnp.bfloat16)
    routing = part(normal(3, TINY.hidden_size), jnp.arange(3))
    np.testing.assert_allclose(
        routing.weights_TX.sum(1), TINY.routed_scaling_factor, rtol=1e-5
    )


def test_09_scores_are_those_of_float64():
    """Small ones too, which log(1 + exp(x)) would lose."""
    part = Router(TINY, hashed=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    part.weight[...] = normal(*part.weight.shape).astype(jnp.bfloat16)
    x_TD = (3.0 * normal(40, TINY.hidden_size)).astype(jnp.bfloat16)
    logits = np.asarray(x_TD, np.float64) @ np.asarray(part.weight[...], np.float64).T
    assert logits.min() < -20 and logits.max() > 20
    expected = np.sqrt(np.log1p(np.exp(logits)))
    scores_TE = part(x_TD, jnp.arange(40)).scores_TE
    np.testing.assert_allclose(scores_TE, expected, rtol=2e-5, atol=2e-19)


def test_09_the_router_has_a_gradient_where_scores_vanish():
    part = Router(TINY, hashed=False, dtype=jnp.float32, rngs=nnx.Rngs(0))
    part.weight[...] = jnp.full(part.weight.shape, -200.0).at[0].set(1.0)
    graph, state = nnx.split(part)

    def total(state):
        routing = nnx.merge(graph, state)(
            jnp.ones((1, TINY.hidden_size)), jnp.arange(1)
        )
        return routing.weights_TX[0, 0]

    assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.grad(total)(state)))


def test_09_the_bias_chooses_and_does_not_weigh():
    part = Router(TINY, hashed=False, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x_TD = normal(4, TINY.hidden_size)
    part.e_score_correction_bias[...] = jnp.zeros(16).at[jnp.array([3, 7])].set(100.0)
    routing = part(x_TD, jnp.zeros(4, jnp.int32))
    assert np.sort(routing.experts_TX, axis=1).tolist() == [[3, 7]] * 4
    scores_TX = np.take_along_axis(routing.scores_TE, routing.experts_TX, axis=1)
    expected = 1.5 * scores_TX / scores_TX.sum(1, keepdims=True)
    np.testing.assert_allclose(routing.weights_TX, expected, rtol=1e-5)


def test_10_routing_tables_stay_integers():
    config = random_config(5) | {"num_hash_layers": 1}
    weights = random_weights(config, 5)
    shapes = {name: value.shape for name, value in weights.items()}
    tensors = Tensors(where="made", shapes=shapes, read=weights.__getitem__)
    model = load_deepseek_v4(v4_config_from_hf(config), tensors, dtype=jnp.bfloat16)
    table = model.layers[0].mlp.gate.tid2eid[...][0]
    assert table.dtype == jnp.int32
    np.testing.assert_array_equal(table, weights["model.layers.0.mlp.gate.tid2eid"])


def test_11_index_scores_are_weighted_sums_of_relus():
    q, k, w = normal(2, 3, 8), normal(5, 8), normal(2, 3)
    dots = np.einsum("tnh,ch->tnc", q, k)
    expected = (np.maximum(dots, 0) * np.asarray(w)[..., None]).sum(1)
    seen = index_scores(q, Table(k[None, None]), w, one_slot(2))
    np.testing.assert_allclose(seen, expected, rtol=1e-4, atol=1e-5)


def test_12_queries_have_a_norm_per_head_without_weight():
    model, row = model_of(0, 4), ids(30)
    plain = logits(model, row)
    for stack in model.layers:
        stack.self_attn.q_b_proj.weight[...] *= 7.0
    np.testing.assert_allclose(logits(model, row), plain, atol=1e-3)


def test_13_the_last_channels_turn_in_neighbouring_pairs():
    turn = PartialRotation.at(TINY.rope, 8, jnp.array([3]))
    x_TNH = normal(1, 1, 20)
    seen = np.asarray(turn(x_TNH))[0, 0]
    x = np.asarray(x_TNH)[0, 0]
    np.testing.assert_array_equal(seen[:12], x[:12])
    for pair in range(4):
        angle = 3 * 10000.0 ** (-2 * pair / 8)
        a, b = x[12 + 2 * pair], x[13 + 2 * pair]
        expected = (
            a * np.cos(angle) - b * np.sin(angle),
            b * np.cos(angle) + a * np.sin(angle),
        )
        np.testing.assert_allclose(seen[12 + 2 * pair :][:2], expected, rtol=1e-4)


def test_14_padding_is_not_compressed():
    """Entries of a slot know its true length, whatever else the pass carries."""
    model, row = model_of(4, 32), ids(66)
    alone, beside = (
        Session(model, 2, 96).feed([row, other], chunk=16, capacity=48)[0][0]
        for other in ([], ids(50, 1))
    )
    np.testing.assert_allclose(alone, beside, atol=1e-3)


def test_14_a_slot_may_be_set_back_by_64_and_no_more():
    model, row = model_of(0, 4, 32), ids(150)
    session, straight = Session(model, 1, 256), Session(model, 1, 256)
    for each in (session, straight):
        each.feed([row[:100]], chunk=50)
    session.feed([ids(model.max_rewind, 7)], chunk=50)
    session.rewind([100])
    rest = row[100:]
    seen, expected = (e.feed([rest], chunk=50)[0][0] for e in (session, straight))
    np.testing.assert_allclose(seen, expected, atol=1e-3)
    one = Sampling.of(1, temperature=0.0)
    with pytest.raises(ValueError, match="forget at most 64 rejected drafts"):
        init_state(model, NgramDrafter(), [[1]], [9], one, block_length=65)


def test_15_sinks_take_weight_and_give_nothing():
    q, rows = normal(1, 2, 8), normal(4, 8)

    def attend(sink):
        sinks = jnp.full((2,), sink)
        tokens = one_slot(1, start=9)
        return sparse_attention(q, rows[3:], rows[None, :3], sinks, tokens, scale=1.0)

    weights = np.exp(np.einsum("tnh,rh->tnr", q, rows))
    for sink in (-np.inf, 0.5):
        total = weights.sum(-1, keepdims=True) + np.exp(sink)
        expected = np.einsum("tnr,rh->tnh", weights / total, rows)
        np.testing.assert_allclose(attend(sink), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(attend(1e4)).max() == 0


def proposals(drafter, model, *, change=None):
    """What it drafts after 20 context rows; `change` alters one of them."""
    taps = np.random.default_rng(1).normal(
        size=(20, len(drafter.taps), TINY.hidden_size)
    )
    if change is not None:
        taps[change] += 3.0
    return proposal(drafter, model, jnp.asarray(taps, jnp.float32))


@jax.jit
def proposal(drafter, model, taps_TmD):
    count = jnp.full(1, len(taps_TmD))
    ids_1Q = jnp.zeros((1, len(taps_TmD)), jnp.int32)
    tokens = FlatTokens.from_rows(ids_1Q, jnp.zeros(1, jnp.int32), count)
    cache = drafter.observe(drafter.init_cache(1, 64), taps_TmD, tokens)

    answer_1S = jnp.arange(64, dtype=jnp.int32)[None] % VOCAB
    length = drafter.block_length
    context = DraftContext.of(answer_1S, count + 1)
    return drafter.propose(model, cache, context, Sampler(greedy_draw), length)[0]


@pytest.fixture(scope="module")
def drafting():
    model = model_of(0, 4, 32, 4)
    return DeepSeekV4DSpark(deepseek_v4_dspark(model.config), rngs=nnx.Rngs(1)), model


def test_16_the_drafter_sees_every_context_row_of_its_window(drafting):
    """The last 16 rows, the newest included, and none before them."""
    drafter, model = drafting
    plain = proposals(drafter, model).q.log_q_BGW
    for row in range(20):
        seen = proposals(drafter, model, change=row).q.log_q_BGW
        assert (np.abs(seen - plain).max() > 1e-4) == (row >= 4), row


def test_16_a_block_sees_itself_and_begins_after_its_context(drafting):
    """The first row changes with the noise behind it; rows know their places."""
    drafter, model = drafting
    other = DeepSeekV4DSpark(
        replace(drafter.config, dspark_noise_token_id=3), rngs=nnx.Rngs(1)
    )

    @jax.jit
    def backbone(drafter):
        cache = drafter.init_cache(1, 64)
        return drafter.backbone(model, cache, jnp.array([5]), jnp.array([0]), 5)

    hidden, changed = backbone(drafter), backbone(other)
    assert np.abs(hidden[:, 0, 0] - changed[:, 0, 0]).max() > 1e-4
    assert np.abs(hidden[:, 0, 1] - hidden[:, 0, 2]).max() > 1e-4


def test_16_confidence_looks_before_the_norm(drafting):
    drafter, model = drafting
    plain = proposals(drafter, model)
    drafter.norm.weight[...] *= 2.0
    try:
        seen = proposals(drafter, model)
    finally:
        drafter.norm.weight[...] /= 2.0
    # The first row's confidence knows neither the norm nor any draft.
    np.testing.assert_allclose(seen.confidence_BG[:, 0], plain.confidence_BG[:, 0])
    assert np.abs(seen.q.log_q_BGW - plain.q.log_q_BGW).max() > 1e-3


def test_16_a_drafter_has_three_stages(drafting):
    assert drafting[0].stages.self_attn.sinks.shape[0] == 3


def test_16_a_block_is_no_longer_than_its_window():
    with pytest.raises(ValueError, match="longer than the window of 16"):
        replace(deepseek_v4_dspark(TINY), dspark_block_size=17)


def test_17_tests_are_long_enough_to_choose():
    """Every parity case has queries with more entries than the indexer may choose."""
    for seed in range(20):
        config = random_config(seed)
        assert max(lengths(config)) // 4 > config["index_topk"]
        assert max(lengths(config)) > max(config["sliding_window"], 2 * 128)
    row = ids(100)
    model = model_of(4)
    plain = logits(model, row)
    model.layers[0].self_attn.indexer.weights_proj.weight[...] *= -1.0
    assert np.abs(logits(model, row)[-1] - plain[-1]).max() > 1e-3


def test_18_the_window_includes_the_query_itself():
    row, model = ids(40), model_of(0, num_hash_layers=0)
    plain = logits(model, row)[-1]
    for distance, matters in ((0, True), (15, True), (16, False)):
        changed = row.copy()
        changed[39 - distance] = (changed[39 - distance] + 1) % VOCAB
        far = np.abs(logits(model, changed)[-1] - plain).max()
        assert (far > 1e-4) == matters, distance


def test_19_compression_of_draft_layers_is_not_the_targets():
    """Released files list 44 or 46 ratios for 43 layers."""
    config = deepseek_v4_flash()
    pending = v4_config_to_hf(config, dtype=jnp.bfloat16)
    for tail in ([], [0], [0, 0, 0]):
        longer = pending | {"compress_ratios": [*config.compress_ratios, *tail]}
        assert v4_config_from_hf(longer) == config


def test_20_a_block_is_no_longer_than_the_drafter_was_made_for(drafting):
    assert check_block_length(drafting[0], None) == 5
    with pytest.raises(ValueError, match="5"):
        check_block_length(drafting[0], 7)


def test_21_ties_go_to_the_earliest_entry():
    """Zeros are common, since ReLU makes them; a longer text must choose alike."""
    scores = jnp.zeros((2, 30)).at[:, 17].set(1.0)
    chosen = top_k(scores, jnp.array([30, 5]), k=TINY.index_topk)
    assert chosen[0].tolist() == [17, 0, 1, 2, 3, 4, 5, 6]
    assert chosen[1].tolist() == [0, 1, 2, 3, 4, -1, -1, -1]


@pytest.mark.parametrize("limit", [0.5, 10.0])
def test_experts_compute_what_a_loop_over_tokens_does(limit):
    """With a limit of 0.5 most of what is gated is clamped, routed experts too."""
    config = replace(TINY, swiglu_limit=limit)
    part = Experts(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    router = Router(TINY, hashed=False, dtype=jnp.float32, rngs=nnx.Rngs(1))
    x_TD = normal(9, TINY.hidden_size)
    routing = router(x_TD, jnp.zeros(9, jnp.int32))
    slots = jnp.array([0] * 7 + [-1, -1])
    seen = part(x_TD, routing, slots, jnp.int32(0))
    for token in range(7):
        total = 0.0
        for expert, weight in zip(
            routing.experts_TX[token], routing.weights_TX[token], strict=True
        ):
            gate, up = jnp.split(part.gate_up_proj[...][expert] @ x_TD[token], 2)
            hidden = jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)
            total += weight * (part.down_proj[...][expert] @ hidden)
        np.testing.assert_allclose(seen[token], total, rtol=1e-3, atol=1e-4)
    assert not np.any(seen[7:])
