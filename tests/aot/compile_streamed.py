"""Compiles the decode loop of DeepSeek-V4-Flash; prints the logits it makes, as JSON.

    python -m tests.aot.compile_streamed v5e:2x2 gumbel rejection

Two layers and eight experts: the vocabulary, which this is about, is whole, and so are
32 slots with blocks of five drafts.
"""

import json
import math
import re
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, use_abstract_mesh

from jaxspark.configs.drafters import deepseek_v4_dspark
from jaxspark.configs.targets import deepseek_v4_flash
from jaxspark.decoding import DecodeOptions, DecodeState, decode
from jaxspark.decoding.compiling import compiler_options
from jaxspark.drafters import DeepSeekV4DSpark
from jaxspark.models import DeepSeekV4
from jaxspark.simulation.chips import parse_slice
from tests.aot.chips import on
from tests.aot.hlo import new_arrays

SLOTS, POSITIONS, BLOCK = 32, 8192, 5
SHAPE = re.compile(r"\[([\d,]+)\]")
# Rounds in which a slot asks for what needs them have them in a branch.
ASKED_FOR = "written_logits"


def report(device, coupling: str) -> dict:
    """The arrays as large as the logits of all drafts, but for those asked for."""
    config = replace(deepseek_v4_flash(), compress_ratios=(4, 128), n_routed_experts=8)

    def made(kind, config):
        return nnx.eval_shape(
            lambda: kind(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        )

    target = made(DeepSeekV4, config)
    drafter = made(DeepSeekV4DSpark, deepseek_v4_dspark(config, stages=1))
    state = jax.eval_shape(
        lambda: DecodeState.empty(
            *(target, drafter), slots=SLOTS, capacity=POSITIONS, block_length=BLOCK
        )
    )
    count = jax.ShapeDtypeStruct((), jnp.int32)
    options = DecodeOptions(block_length=BLOCK, coupling=coupling)
    arguments = on(device, (target, drafter, state, count))
    lowered = decode.lower(*arguments, options=options.resolve(drafter, SLOTS))
    text = lowered.compile(compiler_options=compiler_options()).as_text()
    vocab = config.vocab_size
    large, asked_for = [], 0
    for line in new_arrays(text, SLOTS * BLOCK * vocab):
        shapes = [[int(n) for n in found.split(",")] for found in SHAPE.findall(line)]
        if not any(
            math.prod(shape[:-1]) >= SLOTS * BLOCK and shape[-1] == vocab
            for shape in shapes
        ):
            continue
        if ASKED_FOR in line:
            asked_for += 1
        else:
            large.append(line[:300])
    return {"coupling": coupling, "logits": large, "asked_for": asked_for}


if __name__ == "__main__":
    chip, *couplings = sys.argv[1:]
    device = parse_slice(chip).devices[0]
    mesh = Mesh([device], ("x",)).abstract_mesh
    for coupling in couplings:
        with use_abstract_mesh(mesh):
            print(json.dumps(report(device, coupling)), flush=True)
