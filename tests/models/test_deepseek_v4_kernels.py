"""DeepSeek-V4 decodes with simulated TPU kernels what it decodes with XLA."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxspark.models import DeepSeekV4
from tests.driver import Session, forward
from tests.simulated import tpu_kernels, v4_for_kernels

VOCAB, STEPS = 53, 3


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


@pytest.mark.long
def test_kernels_change_no_token(random):
    model = DeepSeekV4(v4_for_kernels(VOCAB), rngs=nnx.Rngs(1))
    model.embed_tokens.weight[...] *= 30.0
    prompts = [random.integers(0, VOCAB, n).tolist() for n in (10, 3)]
    expected, logits = decoded(model, prompts)
    forward.clear_cache()
    with tpu_kernels() as traced:
        seen, mine = jax.block_until_ready(decoded(model, prompts))
    forward.clear_cache()
    layers = model.config.num_hidden_layers
    twice = ("grouped_matmul", "hyper_connections", "hyper_mix")
    ran = {"sparse_attention": layers} | dict.fromkeys(twice, 2 * layers)
    ran["compress"] = 3  # Entries of both kinds, and index keys.
    assert ran.items() <= traced.items()
    assert seen == expected
    np.testing.assert_allclose(mine, logits, atol=1e-3)
