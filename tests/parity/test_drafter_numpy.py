"""The DSpark drafter equals an independent NumPy implementation of its equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspark.drafters import DraftContext, DSparkConfig, DSparkDrafter
from jaxspark.models import DenseConfig, DenseDecoder, FlatTokens, RopeConfig
from tests.driver import Sampler
from tests.parity.numpy_dspark import NumpyDSpark

TOLERANCE = 2e-4
THETA, EPS, BLOCK, MASK = 5000.0, 1e-6, 6, 60
LENGTHS = (1, 9, 2, 23)  # anchors included, so contexts of 0, 8, 1 and 22 positions

BACKBONE = DenseConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=EPS,
    rope=RopeConfig(rope_theta=THETA),
    qk_norm=True,
)

HEADS = {
    "dflash": {},
    "dflash_as_published": {"sample_from_anchor": False},
    "vanilla": {"markov_rank": 5},
    "vanilla_confidence": {"markov_rank": 5, "enable_confidence_head": True},
    "gated": {"markov_rank": 5, "markov_head_type": "gated"},
    "rnn": {"markov_rank": 5, "markov_head_type": "rnn"},
    "rnn_confidence_markov": {
        "markov_rank": 5,
        "markov_head_type": "rnn",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    },
    "pruned_gated_confidence_markov": {
        "markov_rank": 5,
        "markov_head_type": "gated",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "draft_vocab_size": 17,
    },
}


def randomized(model, random):
    """The model with every parameter drawn anew (nothing stays at a neutral value)."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    flat, named = [], {}
    for path, leaf in nnx.to_flat_state(params):
        name, shape = ".".join(map(str, path)), leaf.shape
        if "norm" in name:
            value = random.uniform(0.5, 1.5, shape)
        elif name.endswith("bias"):
            value = 0.5 * random.standard_normal(shape)
        else:
            value = 1.5 * random.standard_normal(shape) / np.sqrt(shape[-1])
        named[name] = value.astype(np.float32)
        flat.append((path, leaf.replace(jnp.asarray(named[name]))))
    return nnx.merge(graphdef, nnx.from_flat_state(flat), rest), named


def build(options, seed):
    """(drafter, target, taps per slot, anchors, the NumPy draft)."""
    random = np.random.default_rng(seed)
    config = DSparkConfig(
        backbone=BACKBONE,
        block_size=BLOCK,
        target_layer_ids=(-1, 1, 2),
        mask_token_id=MASK,
        num_target_layers=4,
        **options,
    )
    drafter, weights = randomized(DSparkDrafter(config, rngs=nnx.Rngs(0)), random)
    target, target_weights = randomized(
        DenseDecoder(BACKBONE, rngs=nnx.Rngs(0)), random
    )
    head, target_ids = target_weights["lm_head.weight"], None
    if config.draft_vocab_size:
        size = config.draft_vocab_size
        target_ids = np.sort(random.permutation(BACKBONE.vocab_size)[:size])
        drafter.draft_ids[...] = jnp.asarray(target_ids)
        head = weights["lm_head.weight"]
    confidence = None
    if config.enable_confidence_head:
        confidence = "markov" if config.confidence_head_with_markov else "plain"
    reference = NumpyDSpark(
        weights,
        target_weights["embed_tokens.weight"],
        head,
        heads=4,
        kv_heads=2,
        eps=EPS,
        theta=THETA,
        mask_token=MASK,
        kind=config.markov_head_type if config.markov_rank else None,
        confidence=confidence,
        target_ids=target_ids,
        anchor_predicts=config.sample_from_anchor,
    )
    taps = [random.standard_normal((3, n - 1, 24)).astype("f4") for n in LENGTHS]
    anchors = random.integers(0, BACKBONE.vocab_size, len(LENGTHS))
    return drafter, target, taps, anchors, reference


def observed(drafter, taps, *, chunk):
    """The drafter's cache after it has seen every slot's taps, `chunk` at a time."""
    slots = len(taps)
    cache = drafter.init_cache(slots, 48)
    for start in range(0, max(part.shape[1] for part in taps), chunk):
        parts = [part[:, start : start + chunk] for part in taps]
        counts_B = jnp.array([part.shape[1] for part in parts])
        starts_B = jnp.full((slots,), start)
        ids_BQ = jnp.zeros((slots, chunk), jnp.int32)
        tokens = FlatTokens.from_rows(ids_BQ, starts_B, counts_B)
        packed_mTD = np.concatenate(parts, axis=1)
        missing = slots * chunk - packed_mTD.shape[1]
        packed_mTD = np.pad(packed_mTD, ((0, 0), (0, missing), (0, 0)))
        taps_TmD = jnp.asarray(packed_mTD.swapaxes(0, 1))
        cache = observe(drafter, cache, taps_TmD, tokens)
    return cache


@jax.jit
def observe(drafter, cache, taps_TmD, tokens):
    return drafter.observe(cache, taps_TmD, tokens)


def propose(drafter, target, cache, anchors, length, chosen=None):
    """Proposal with greedy or given tokens; log_q holds the corrected logits.

    And the hidden states and base logits it is made of.
    """
    tokens_BS = np.zeros((len(LENGTHS), 48), np.int32)
    lengths_B = np.asarray(LENGTHS, np.int32)
    tokens_BS[np.arange(len(LENGTHS)), lengths_B - 1] = anchors
    greedy = np.full((len(LENGTHS), length), -1)
    chosen_BG = jnp.asarray(greedy if chosen is None else chosen, jnp.int32)
    return _proposed(drafter, target, cache, tokens_BS, lengths_B, chosen_BG)


@jax.jit
def _proposed(drafter, target, cache, tokens_BS, lengths_B, chosen_BG):
    def draw(logits_BW, j, ids_W):
        best_B = jnp.argmax(logits_BW, axis=-1)
        best_B = best_B if ids_W is None else ids_W[best_B]
        given_B = jnp.where(chosen_BG[:, j] < 0, best_B, chosen_BG[:, j])
        return given_B.astype(jnp.int32), logits_BW, logits_BW[:, 0]

    length = chosen_BG.shape[1]
    context = DraftContext.of(tokens_BS, lengths_B)
    hidden_BGD, _ = drafter.backbone(
        target, cache, context.anchors_B, context.positions_B, length
    )
    base_BGW = drafter.logits(target, hidden_BGD)
    proposal, _ = drafter.propose(target, cache, context, Sampler(draw), length)
    return proposal, hidden_BGD, base_BGW


def close(ours, reference, what):
    worst = np.abs(np.asarray(ours) - np.asarray(reference)).max()
    assert worst <= TOLERANCE, (what, float(worst))


@pytest.mark.parametrize(
    ("name", "length"),
    [*((name, BLOCK) for name in HEADS), ("dflash_as_published", 3), ("rnn", 3)],
)
def test_drafts_equal_numpy(name, length, seed):
    drafter, target, taps, anchors, reference = build(HEADS[name], seed)
    cache = observed(drafter, taps, chunk=5)
    random = np.random.default_rng(seed + 1)
    for chosen in (None, random.integers(0, 61, (len(LENGTHS), length))):
        proposal, hidden_BGD, base_BGW = propose(
            drafter, target, cache, anchors, length, chosen
        )
        for b, anchor in enumerate(anchors):
            hidden, base, corrected, tokens, confidence = reference.draft(
                taps[b], anchor, length, None if chosen is None else chosen[b]
            )
            where = (name, f"{seed=}", f"slot {b}")
            close(hidden_BGD[b], hidden, ("hidden", *where))
            close(base_BGW[b], base, ("base logits", *where))
            close(proposal.q.log_q_BGW[b], corrected, ("corrected logits", *where))
            close(proposal.confidence_BG[b], confidence, ("confidence", *where))
            best_two = np.sort(corrected, axis=-1)[:, -2:]
            if (np.diff(best_two) > 1e-3).all():
                assert proposal.tokens_BG[b].tolist() == tokens, where


def test_drafting_leaves_no_trace_in_the_context():
    """Observing after a discarded block equals never having drafted it."""
    drafter, target, taps, anchors, _ = build(HEADS["rnn_confidence_markov"], 7)
    clean = observed(drafter, taps, chunk=23)
    half = observed(drafter, [part[:, : part.shape[1] // 2] for part in taps], chunk=23)
    lengths_B = jnp.array([(n - 1) // 2 for n in LENGTHS])
    _, half = drafter.backbone(
        target, half, jnp.asarray(anchors, jnp.int32), lengths_B, BLOCK
    )
    counts_B = jnp.asarray(LENGTHS) - 1 - lengths_B
    tokens = FlatTokens.from_rows(jnp.zeros((4, 23), jnp.int32), lengths_B, counts_B)
    packed = np.concatenate([p[:, p.shape[1] // 2 :] for p in taps], axis=1)
    packed = np.pad(packed, ((0, 0), (0, 4 * 23 - packed.shape[1]), (0, 0)))
    half = observe(drafter, half, jnp.asarray(packed.swapaxes(0, 1)), tokens)
    first = propose(drafter, target, clean, anchors, BLOCK)[0]
    second = propose(drafter, target, half, anchors, BLOCK)[0]
    assert first.tokens_BG.tolist() == second.tokens_BG.tolist()
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: jnp.allclose(a, b, atol=1e-5),
            (first.q.log_q_BGW, first.confidence_BG),
            (second.q.log_q_BGW, second.confidence_BG),
        )
    )
