"""Compiles the decode loop for one platform; prints what became of the caches, as JSON.

    python -m tests.aot.compile_round cpu '{"drafter": "dspark", "dtype": "bfloat16"}'

A program of its own: the compilers for chips that this machine need not have come from
another environment (`.venv-aot`), and must be known before JAX is imported. One line of
JSON per case; nothing is run and no array is ever allocated.
"""

import json
import sys
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspark.decoding import DecodeOptions, DecodeState
from jaxspark.decoding.compiling import compiler_options
from jaxspark.decoding.loop import decode
from jaxspark.drafters import (
    DSparkConfig,
    DSparkDrafter,
    Eagle3Config,
    Eagle3Drafter,
    NgramDrafter,
    hybrid,
)
from jaxspark.exactness.audit_schedules import scheduler, synthetic_costs
from jaxspark.models import DenseConfig, DenseDecoder, RopeConfig
from jaxspark.models.pages import pages_for
from tests.aot.chips import device_of, on, tracing_for
from tests.aot.hlo import new_arrays

# Caches dominate: one layer's keys are 25 million numbers, the logits of 48 verified
# rows 2.4 million. Much smaller ones would fit the vector memory of a TPU v5e (128 MB),
# which then moves them there and back: copies to look at, but none by mistake.
SLOTS, POSITIONS, BLOCK = 16, 8192, 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """One program.

    Attributes:
      drafter: "ngram", "dspark" with one layer, "dspark pruned" with fewer tokens,
        "hybrid" of the latter, or "eagle3".
      dtype: of parameters, activations and caches.
      coupling: how drafts are verified.
      schedule: what is verified, and whether a round drafts.
      layers: depth of the target, which is otherwise SmolLM2-135M.
      pages: whether caches lie in pages, as many as slots can have.
      mistake: "" compiles the decode loop as it is; "not donated" without giving it the
        state; "transposed" compiles a loop that stores caches as [B, S, K, H].
    """

    drafter: str = "ngram"
    dtype: str = "float32"
    coupling: str = "rejection"
    schedule: str = "fixed"
    layers: int = 2
    pages: bool = False
    mistake: str = ""


def models(case: Case):
    """The target and the drafter, without arrays."""
    shape = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "rope": RopeConfig(rope_theta=1e5),
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
    dtype = jnp.dtype(case.dtype)
    config = DenseConfig(num_hidden_layers=case.layers, **shape)
    target = nnx.eval_shape(lambda: DenseDecoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    if case.drafter == "ngram":
        return target, NgramDrafter(block_length=BLOCK)
    shared = {
        "backbone": DenseConfig(num_hidden_layers=1, **shape),
        "target_layer_ids": (0, case.layers - 1),
        "num_target_layers": case.layers,
    }

    def made(kind, config):
        return nnx.eval_shape(lambda: kind(config, dtype=dtype, rngs=nnx.Rngs(0)))

    if case.drafter == "eagle3":
        config = Eagle3Config(ttt_length=BLOCK, **shared)
        return target, made(Eagle3Drafter, config)
    config = DSparkConfig(
        block_size=BLOCK,
        mask_token_id=0,
        markov_rank=64,
        enable_confidence_head=True,
        confidence_head_with_markov=True,
        draft_vocab_size=None if case.drafter == "dspark" else 16384,
        **shared,
    )
    drafter = made(DSparkDrafter, config)
    if case.drafter == "hybrid":
        drafter = hybrid(NgramDrafter(block_length=BLOCK), drafter)
    return target, drafter


def abstract_state(target, drafter, pages: bool):
    """A `DecodeState` without arrays."""
    return jax.eval_shape(
        lambda: DecodeState.empty(
            target,
            drafter,
            slots=SLOTS,
            capacity=POSITIONS,
            block_length=BLOCK,
            pages=SLOTS * pages_for(POSITIONS) if pages else None,
        )
    )


def compile_decode(case: Case, device):
    """The compiled loop on `device`, and the abstract caches it works on."""
    target, drafter = models(case)
    state = abstract_state(target, drafter, case.pages)
    full = SLOTS * (BLOCK + 1)
    # As `generate` chooses them for a drafter that may propose nothing.
    sizes = (SLOTS if case.drafter == "ngram" else full // 2, full)
    costs = synthetic_costs(sizes, SLOTS, draft_lengths=(1, BLOCK))
    schedule = scheduler(case.schedule, costs)
    options = DecodeOptions(
        block_length=BLOCK,
        coupling=case.coupling,
        schedule=schedule,
        buckets=sizes if schedule.costs is None else None,
    )
    program = decode
    if case.mistake == "not donated":
        program = jax.jit(decode.__wrapped__, static_argnames=("options",))
    count = jax.ShapeDtypeStruct((), jnp.int32)
    arguments = on(device, (target, drafter, state, count))
    lowered = program.lower(*arguments, options=options)
    compiled = lowered.compile(compiler_options=compiler_options())
    return compiled, (state.target_cache, state.draft_cache)


def compile_transposed(device):
    """A loop that writes and reads a cache [B, S, K, H]; and that cache."""
    cache = jax.ShapeDtypeStruct((SLOTS, POSITIONS, 3, 128), jnp.float32)

    def loop(cache_BSKH, x_BKH):
        def body(step, carry):
            cache_BSKH, x_BKH = carry
            cache_BSKH = cache_BSKH.at[:, step].set(x_BKH)
            scores_BKS = jnp.einsum("BKH,BSKH->BKS", x_BKH, cache_BSKH)
            weights_BKS = jax.nn.softmax(scores_BKS)
            return cache_BSKH, jnp.einsum("BKS,BSKH->BKH", weights_BKS, cache_BSKH)

        return jax.lax.fori_loop(0, POSITIONS, body, (cache_BSKH, x_BKH))

    x = jax.ShapeDtypeStruct((SLOTS, 3, 128), jnp.float32)
    lowered = jax.jit(loop, donate_argnums=0).lower(*on(device, (cache, x)))
    return lowered.compile(), cache


def report(case: Case, device) -> dict:
    """What the compiled loop does with the caches."""
    start = time.perf_counter()
    if case.mistake == "transposed":
        compiled, caches = compile_transposed(device)
    else:
        compiled, caches = compile_decode(case, device)
    seconds = time.perf_counter() - start
    # What grows with positions; a hybrid's history is a few numbers per slot.
    arrays = [x for x in jax.tree.leaves(caches) if x.size >= SLOTS * POSITIONS]
    memory = compiled.memory_analysis()
    return {
        "copies": new_arrays(compiled.as_text(), min(array.size for array in arrays)),
        "cache_bytes": sum(array.size * array.dtype.itemsize for array in arrays),
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "compile_seconds": round(seconds, 1),
    }


def main(platform: str, cases: list[Case]):
    """Reports on each case."""
    device = device_of(platform)
    with tracing_for(platform):
        for case in cases:
            print(json.dumps(report(case, device)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], [Case(**json.loads(case)) for case in sys.argv[2:]])
