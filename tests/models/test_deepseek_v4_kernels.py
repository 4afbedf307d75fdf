"""DeepSeek-V4 decodes with simulated TPU kernels what it decodes with XLA."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from jaxspark.configs.targets import deepseek_v4_tiny
from jaxspark.models import DeepSeekV4
from pallas_kernels.compress import api as compression
from pallas_kernels.compress import mosaic_tpu_kernel as compression_kernel
from pallas_kernels.grouped_matmul import api as experts
from pallas_kernels.grouped_matmul import mosaic_tpu_kernel
from pallas_kernels.indexer_topk.api import IMPLEMENTATIONS as INDEXERS
from pallas_kernels.sparse_attention import api, mosaic_tpu_chunks
from tests.driver import Session, forward

VOCAB, STEPS = 53, 3


@pytest.fixture
def model():
    """Sizes that the kernels take; windows and entries end within short texts."""
    config = replace(
        deepseek_v4_tiny(VOCAB),
        hidden_size=128,
        moe_intermediate_size=128,
        head_dim=256,
        num_attention_heads=8,
        sliding_window=6,
        hca_ratio=8,
        index_n_heads=8,
        index_head_dim=128,
        index_topk=2,
        hc_sinkhorn_iters=3,
        compress_ratios=(0, 4, 8),
    )
    model = DeepSeekV4(config, rngs=nnx.Rngs(1))
    model.embed_tokens.weight[...] *= 30.0
    return model


def decoded(model, prompts):
    """Greedy tokens, three to a pass, of which the last is always rejected."""
    session = Session(model, len(prompts), 32)
    logits = session.feed([prompt[:-1] for prompt in prompts], chunk=3)[0]
    tokens, every = [[p[-1]] for p in prompts], [np.concatenate(logits)]
    for _ in range(STEPS):
        logits, _ = session.feed([[each[-1], 7, 9] for each in tokens])
        session.rewind(session.lengths_B - 2)
        every += logits
        for each, rows in zip(tokens, logits):
            each.append(int(rows[0].argmax()))
    return tokens, np.concatenate(every)


def test_kernels_change_no_token(model, monkeypatch, random):
    prompts = [random.integers(0, VOCAB, n).tolist() for n in (10, 3)]
    expected, logits = decoded(model, prompts)
    kernel = api.IMPLEMENTATIONS["mosaic_tpu"]
    ran = []

    def run(*operands, **static):
        assert kernel.supports(*operands, **static) is None
        *_, ragged, entries, _ = operands
        ran.append(entries)
        if entries is not None and entries.index is not None:
            choice = (entries.index, entries.limits_T, ragged)
            assert INDEXERS["mosaic_tpu"].supports(*choice) is None
        return kernel.run(*operands, **static)

    multiply = experts.IMPLEMENTATIONS["mosaic_tpu"]
    products = []

    def multiplied(*operands, **static):
        assert multiply.supports(*operands, **static) is None
        products.append(operands)
        return multiply.run(*operands, **static)

    pool = compression.IMPLEMENTATIONS["mosaic_tpu"]
    pooled = []

    def pools(*operands, **static):
        assert pool.supports(*operands, **static) is None
        pooled.append(operands)
        return pool.run(*operands, **static)

    # The platform is a CPU: what its programs call is replaced.
    for op, each, instead in (
        (api, kernel, run),
        (experts, multiply, multiplied),
        (compression, pool, pools),
    ):
        replaced = {"xla": replace(each, run=instead, platforms=())}
        monkeypatch.setattr(op, "IMPLEMENTATIONS", replaced)
    monkeypatch.setattr(mosaic_tpu_chunks, "TOGETHER", 1)
    monkeypatch.setattr(compression_kernel, "TOGETHER", 1)
    monkeypatch.setattr(mosaic_tpu_kernel, "BROADCAST_LOADS", False)
    forward.clear_cache()
    simulated = pltpu.InterpretParams(uninitialized_memory="nan")
    with pltpu.force_tpu_interpret_mode(simulated):
        seen, mine = jax.block_until_ready(decoded(model, prompts))
    forward.clear_cache()
    assert len(ran) == len(model.config.compress_ratios) and products
    # Entries of both kinds, and index keys.
    assert len(pooled) == 3
    assert seen == expected
    np.testing.assert_allclose(mine, logits, atol=1e-3)
