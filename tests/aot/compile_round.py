"""Compiles the decode loop for one platform; prints what became of the caches, as JSON.

    python -m tests.aot.compile_round cpu '{"drafter": "dspark", "dtype": "bfloat16"}'

A program of its own: the compilers for chips that this machine need not have come from
another environment (`.venv-aot`), and must be known before JAX is imported. One line of
JSON per case; nothing is run and no array is ever allocated.
"""

import json
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)

from jaxspark.decoding import DecodeOptions, init_state
from jaxspark.decoding.round import decode
from jaxspark.decoding.sampling import Sampling
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
from tests.aot.hlo import new_arrays

# Caches dominate: one layer's keys are 25 million numbers, the logits of 48 verified
# rows 2.4 million. Much smaller ones would fit the vector memory of a TPU v5e (128 MB),
# which then moves them there and back: copies to look at, but none by mistake.
SLOTS, POSITIONS, BLOCK = 16, 8192, 2
LANES = {"cpu": 1, "tpu": 128, "h100": 1}

H100_NAME = "NVIDIA H100 80GB HBM3"
# An XLA GpuTargetConfigProto, as text: an H100 SXM.
H100 = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 device_address_bits: 64
  pcie_bandwidth: 34359738368 ecc_enabled: true
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  device_vendor: "NVIDIA Corporation" name: "{H100_NAME}"
  platform_version: "Compute Capability 9.0a"
  driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{H100_NAME}"
"""


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
      mistake: "" compiles the decode loop as it is; "not donated" without giving it the
        state; "transposed" compiles a loop that stores caches as [B, S, K, H].
    """

    drafter: str = "ngram"
    dtype: str = "float32"
    coupling: str = "rejection"
    schedule: str = "fixed"
    layers: int = 2
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


def abstract_state(target, drafter, lanes: int):
    """A `DecodeState` without arrays."""

    def initial():
        state = init_state(
            target,
            drafter,
            [[1]] * SLOTS,
            [POSITIONS - BLOCK] * SLOTS,
            Sampling.of(SLOTS, temperature=1.0, top_p=0.9),
            block_length=BLOCK,
            capacity=POSITIONS,
        )
        size = (SLOTS, POSITIONS)
        caches = {"target_cache": target.init_cache(*size, lanes=lanes)}
        if state.draft_cache:
            caches["draft_cache"] = drafter.init_cache(*size, lanes=lanes)
        return replace(state, **caches)

    return jax.eval_shape(initial)


def on(device, tree):
    """The same abstract arrays, placed on a device."""
    sharding = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )


def compile_decode(case: Case, device, lanes: int):
    """The compiled loop on `device`, and the abstract caches it works on."""
    target, drafter = models(case)
    state = abstract_state(target, drafter, lanes)
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
    return lowered.compile(), (state.target_cache, state.draft_cache)


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


def report(case: Case, platform: str, device) -> dict:
    """What the compiled loop does with the caches."""
    start = time.perf_counter()
    if case.mistake == "transposed":
        compiled, caches = compile_transposed(device)
    else:
        compiled, caches = compile_decode(case, device, LANES[platform])
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


def device_of(platform: str):
    """A device to compile for: "cpu", "tpu" (v5e) or "h100"."""
    if platform == "cpu":
        return jax.devices("cpu")[0]
    if platform == "tpu":
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    else:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=H100, topology="1x1x1"
        )
    return topology.devices[0]


def main(platform: str, cases: list[Case]):
    """Reports on each case."""
    device = device_of(platform)
    tracing_for = nullcontext()
    if platform == "h100":
        kind = AbstractDevice(device_kind=H100_NAME, num_cores=132, platform="gpu")
        tracing_for = use_abstract_mesh(
            AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=kind)
        )
    with tracing_for:
        for case in cases:
            print(json.dumps(report(case, platform, device)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], [Case(**json.loads(case)) for case in sys.argv[2:]])
