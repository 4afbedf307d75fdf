"""Options of the compiler that a round wants, on platforms where it matters.

They belong to the executable, so a program that imports us keeps its own for all else.
JAX takes them for whole programs only: the hosts of the loop compile `decode` by
`compiled`, a `jit` around it decides for itself.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.dispatch import expected_platform

COMPILER_OPTIONS: dict[str, dict[str, str | bool]] = {
    # Small gathers of a round are slower on a SparseCore than where their results are
    # used (jax issue 40553); large ones of a prefill are not.
    "tpu": {
        "xla_tpu_offload_gather_to_sparsecore": "false",
        "xla_tpu_offload_all_supported_gathers_to_sparsecore": "false",
    },
    # The first pass looks for tiles of softmaxes for half an hour: DeepSeek-V4-Flash on
    # H100s compiles in 41 seconds without. The second cuts the sums of products of few
    # rows into as many as eight, written in float32, before autotuning can compare
    # (which has cuBLAS's split sums to choose from as well).
    "gpu": {
        "xla_disable_hlo_passes": "triton-softmax-rewriter,splitk-rewriter",
        "xla_gpu_enable_latency_hiding_scheduler": True,
    },
}


def compiler_options() -> dict[str, str | bool] | None:
    """Those for the platform that programs are being made for."""
    return COMPILER_OPTIONS.get(expected_platform())


def compiled[**P, T](program: Callable[P, T]) -> Callable[P, T]:
    """`decode`, compiled with the platform's options.

    Args:
      program: jitted, with static `options`; donates `state`.
    """
    platform = expected_platform()
    return _compiled(program, platform) if platform in COMPILER_OPTIONS else program


@functools.cache
def _compiled(program: Callable, platform: str) -> Any:
    return jax.jit(
        program,
        static_argnames=("options",),
        donate_argnames=("state",),
        compiler_options=COMPILER_OPTIONS[platform],
    )
