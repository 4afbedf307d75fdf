"""Compiles the decode loop of DeepSeek-V4-Flash; prints the logits it makes, as JSON.

    python -m tests.aot.compile_streamed v5e:2x2 gumbel whole
    python -m tests.aot.compile_streamed v5e:2x2 rejection small

One layer and eight experts: the vocabulary, which this is about, is whole, and so are
32 slots with blocks of five drafts. A small program has an eighth of the vocabulary for
a quarter of the slots.
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

# Slots, and the vocabulary if it is not the model's.
SIZES = {"whole": (32, None), "small": (8, 16384)}
POSITIONS, BLOCK = 8192, 5
SHAPE = re.compile(r"\[([\d,]+)\]")
# Rounds in which a slot asks for what needs them have them in a branch.
ASKED_FOR = "written_logits"


def report(device, coupling: str, size: str) -> dict:
    """Arrays of logits that every round makes, and how many there are in all."""
    slots, vocab = SIZES[size]
    flash = deepseek_v4_flash()
    config = replace(
        flash,
        compress_ratios=(128,),
        n_routed_experts=8,
        vocab_size=vocab or flash.vocab_size,
    )

    def made(kind, config):
        return nnx.eval_shape(
            lambda: kind(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        )

    target = made(DeepSeekV4, config)
    drafter = made(DeepSeekV4DSpark, deepseek_v4_dspark(config, stages=1))
    state = jax.eval_shape(
        lambda: DecodeState.empty(
            *(target, drafter), slots=slots, capacity=POSITIONS, block_length=BLOCK
        )
    )
    count = jax.ShapeDtypeStruct((), jnp.int32)
    options = DecodeOptions(block_length=BLOCK, coupling=coupling)
    arguments = on(device, (target, drafter, state, count))
    lowered = decode.lower(*arguments, options=options.resolve(drafter, slots))
    text = lowered.compile(compiler_options=compiler_options()).as_text()
    every, unasked = (
        _logits(text, slots, config.vocab_size, without=without)
        for without in (None, ASKED_FOR)
    )
    return {"coupling": coupling, "logits": unasked, "asked_for": len(every)}


def _logits(text: str, slots: int, vocab: int, *, without: str | None) -> list[str]:
    """Types of new arrays of whole vocabularies, as many rows as drafts or more."""
    found = []
    for line in new_arrays(text, slots * BLOCK * vocab, without=without):
        for shape in SHAPE.findall(line):
            *rows, width = map(int, shape.split(","))
            if width == vocab and math.prod(rows) >= slots * BLOCK:
                found.append(shape)
                break
    return found


if __name__ == "__main__":
    chip, *case = sys.argv[1:]
    device = parse_slice(chip).devices[0]
    with use_abstract_mesh(Mesh([device], ("x",)).abstract_mesh):
        print(json.dumps(report(device, *case)))
