"""Compiles the decode loop of DeepSeek-V4-Flash; prints the logits it makes, as JSON.

    python -m tests.aot.compile_streamed v5e:2x2 gumbel rejection

One layer and eight experts: the vocabulary, which this is about, is whole, and so are
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
    """Arrays of logits that every round makes, and how many there are in all."""
    config = replace(deepseek_v4_flash(), compress_ratios=(128,), n_routed_experts=8)

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
    every, unasked = (
        _logits(text, vocab, without=without) for without in (None, ASKED_FOR)
    )
    return {"coupling": coupling, "logits": unasked, "asked_for": len(every)}


def _logits(text: str, vocab: int, *, without: str | None) -> list[str]:
    """Types of new arrays of whole vocabularies, as many rows as drafts or more."""
    found = []
    for line in new_arrays(text, SLOTS * BLOCK * vocab, without=without):
        for shape in SHAPE.findall(line):
            *rows, width = map(int, shape.split(","))
            if width == vocab and math.prod(rows) >= SLOTS * BLOCK:
                found.append(shape)
                break
    return found


if __name__ == "__main__":
    chip, *couplings = sys.argv[1:]
    device = parse_slice(chip).devices[0]
    mesh = Mesh([device], ("x",)).abstract_mesh
    for coupling in couplings:
        with use_abstract_mesh(mesh):
            print(json.dumps(report(device, coupling)), flush=True)
