"""Programs of a CPU in which kernels for TPUs run, in simulated memory."""

import importlib
import pkgutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from jax.experimental.pallas import tpu as pltpu

import pallas_kernels
from jaxspark.configs.targets import deepseek_v4_tiny
from jaxspark.models import DeepSeekV4Config
from pallas_kernels.compress import mosaic_tpu_sizes as compression
from pallas_kernels.grouped_matmul import mosaic_tpu_kernel
from pallas_kernels.sparse_attention import mosaic_tpu_chunks


def v4_for_kernels(vocab_size: int) -> DeepSeekV4Config:
    """The smallest that kernels take; windows and entries end within short texts."""
    return replace(
        deepseek_v4_tiny(vocab_size),
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


@contextmanager
def tpu_kernels() -> Iterator[Counter]:
    """Within it every op runs its TPU kernel where that supports the operands.

    JAX keeps what it compiled before; programs must be new, or forgotten.

    Yields:
      How many calls of each op were traced, by name; "op by xla" for those that its
      kernel does not support.
    """
    traced: Counter = Counter()
    folders = pkgutil.iter_modules(pallas_kernels.__path__)
    with pytest.MonkeyPatch.context() as patch:
        for op in (each.name for each in folders if each.ispkg):
            api = importlib.import_module(f"pallas_kernels.{op}.api")
            if "mosaic_tpu" in api.IMPLEMENTATIONS:
                run = _kernel_or_reference(op, api.IMPLEMENTATIONS, traced)
                # The platform is a CPU: what its programs call is replaced.
                replaced = {"xla": replace(api.IMPLEMENTATIONS["xla"], run=run)}
                patch.setattr(api, "IMPLEMENTATIONS", api.IMPLEMENTATIONS | replaced)
        patch.setattr(mosaic_tpu_chunks, "TOGETHER", 1)
        patch.setattr(compression, "TOGETHER", 1)
        patch.setattr(mosaic_tpu_kernel, "BROADCAST_LOADS", False)
        simulated = pltpu.InterpretParams(uninitialized_memory="nan")
        with pltpu.force_tpu_interpret_mode(simulated):
            yield traced


def _kernel_or_reference(op, implementations, traced):
    kernel, reference = implementations["mosaic_tpu"], implementations["xla"]

    def run(*operands, **static):
        supported = kernel.supports(*operands, **static) is None
        traced[op if supported else f"{op} by xla"] += 1
        return (kernel if supported else reference).run(*operands, **static)

    return run
