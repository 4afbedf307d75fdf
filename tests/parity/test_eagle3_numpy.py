"""The Eagle3 drafter equals NumPy written from its equations, without any cache."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspark.drafters import DraftContext, Eagle3Config, Eagle3Drafter
from jaxspark.models import DenseDecoder, FlatTokens
from tests.driver import Sampler
from tests.parity.numpy_dspark import rms_norm, rope, sigmoid, softmax
from tests.parity.test_drafter_numpy import (
    BACKBONE,
    BLOCK,
    EPS,
    THETA,
    close,
    randomized,
)

LENGTHS = (2, 9, 23)
TAPS = (0, 2, 3)


def draft(w, embedding, head, taps, ids, chosen):
    """Logits [G, W]; taps [m, a, D] of the positions before the anchor ids[a]."""
    features = list(np.concatenate(list(taps), axis=-1) @ w["fc.weight"].T)
    tokens = list(ids[1:])  # token i completes the pair of feature i
    name = "layers.0."

    def projected(which, heads):
        rows = np.concatenate(
            [
                rms_norm(embedding[tokens], w[name + "input_layernorm.weight"], EPS),
                rms_norm(np.array(features), w[name + "hidden_norm.weight"], EPS),
            ],
            axis=-1,
        )
        y = rows @ w[f"{name}self_attn.{which}_proj.weight"].T
        y = y.reshape(len(rows), heads, -1)
        if which == "v":
            return y
        y = rms_norm(y, w[f"{name}self_attn.{which}_norm.weight"], EPS)
        return rope(y, np.arange(len(rows), dtype=float), THETA)

    logits = []
    for token in chosen:
        q, k, v = projected("q", 4), projected("k", 2), projected("v", 2)
        heads = [
            softmax(q[-1, n] @ k[:, n // 2].T / np.sqrt(8)) @ v[:, n // 2]
            for n in range(4)
        ]
        x = features[-1] + w[name + "self_attn.o_proj.weight"] @ np.concatenate(heads)
        h = rms_norm(x, w[name + "post_attention_layernorm.weight"], EPS)
        gate, up = (w[f"{name}mlp.{each}_proj.weight"] @ h for each in ("gate", "up"))
        x = x + w[name + "mlp.down_proj.weight"] @ (gate * sigmoid(gate) * up)
        logits.append(head @ rms_norm(x, w["norm.weight"], EPS))
        features.append(x)
        tokens.append(token)
    return np.array(logits)


@pytest.mark.parametrize("pruned", [None, 17])
def test_eagle3_drafts_equal_numpy(pruned, random):
    config = Eagle3Config(
        backbone=BACKBONE.__class__(**{**vars(BACKBONE), "num_hidden_layers": 1}),
        ttt_length=BLOCK,
        target_layer_ids=TAPS,
        num_target_layers=4,
        draft_vocab_size=pruned,
    )
    drafter, weights = randomized(Eagle3Drafter(config, rngs=nnx.Rngs(0)), random)
    target, target_weights = randomized(
        DenseDecoder(BACKBONE, rngs=nnx.Rngs(0)), random
    )
    embedding = target_weights["embed_tokens.weight"].astype("f8")
    head = weights["lm_head.weight"] if pruned else target_weights["lm_head.weight"]
    slots, width = len(LENGTHS), max(LENGTHS)
    ids_BS = random.integers(0, 61, (slots, width + BLOCK)).astype(np.int32)
    taps_BmSD = random.standard_normal((slots, 3, width, 24)).astype("f4")
    lengths_B = np.array(LENGTHS, np.int32)

    cache = drafter.init_cache(slots, width + BLOCK)
    for begin in range(0, width, 5):
        counts_B = np.clip(lengths_B - 1 - begin, 0, 5)
        tokens = FlatTokens.from_rows(
            jnp.asarray(ids_BS[:, begin : begin + 5]),
            jnp.full((slots,), begin),
            jnp.asarray(counts_B),
        )
        rows = [taps_BmSD[b, :, begin : begin + n] for b, n in enumerate(counts_B)]
        taps_mTD = np.concatenate(rows, axis=1)
        missing = tokens.ids_T.shape[0] - taps_mTD.shape[1]
        taps_mTD = np.pad(taps_mTD, ((0, 0), (0, missing), (0, 0)))
        embedded_TD = target.embed(tokens.ids_T)
        taps_mTD = jnp.concatenate([embedded_TD[None], taps_mTD])
        cache = drafter.observe(cache, taps_mTD.swapaxes(0, 1), tokens)

    chosen_BG = random.integers(0, 61, (slots, BLOCK)).astype(np.int32)

    def draw(logits_BW, j, ids_W):
        return jnp.asarray(chosen_BG)[:, j], logits_BW, logits_BW[:, 0]

    proposal, _ = drafter.propose(
        target,
        cache,
        DraftContext.of(jnp.asarray(ids_BS), jnp.asarray(lengths_B)),
        Sampler(draw),
        BLOCK,
    )
    w = {key: value.astype("f8") for key, value in weights.items()}
    for b, length in enumerate(LENGTHS):
        expected = draft(
            w,
            embedding,
            head.astype("f8"),
            taps_BmSD[b, :, : length - 1].astype("f8"),
            ids_BS[b, :length],
            chosen_BG[b],
        )
        close(proposal.q.log_q_BGW[b], expected, f"slot {b}")
