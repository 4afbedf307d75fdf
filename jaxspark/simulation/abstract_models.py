"""Models that are only described: shapes and types, no numbers."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspark.checkpoints.deepseek_v4 import (
    Plan,
    draft_plan,
    target_plan,
    turns_over,
)
from jaxspark.checkpoints.deepseek_v4_released import storage
from jaxspark.configs import drafters as draft_configs
from jaxspark.drafters import DeepSeekV4DSpark, DSparkDrafter
from jaxspark.models import DeepSeekV4, DeepSeekV4Config, DenseConfig, DenseDecoder
from jaxspark.quantization import blocks
from pallas_kernels.quantized import Quantized
from pallas_kernels.transposed import FP8, Transposed


def abstract_models(
    config: DenseConfig | DeepSeekV4Config,
    *,
    dtype: Any = jnp.bfloat16,
    quantized: bool = False,
    block_length: int = 5,
) -> tuple[Any, Any]:
    """A target of an architecture and the DSpark drafter that goes with it.

    Args:
      config: of the target.
      dtype: of parameters, activations and caches.
      quantized: whether DeepSeek-V4's matrices stay as released files hold them.
      block_length: drafts of a block; a V4 checkpoint's own stages have their number.

    Raises:
      ValueError: a dense model is to stay quantized.
    """

    def described(kind: Any, config: Any) -> Any:
        return nnx.eval_shape(lambda: kind(config, dtype=dtype, rngs=nnx.Rngs(0)))

    if isinstance(config, DenseConfig):
        if quantized:
            raise ValueError("only the matrices of DeepSeek-V4 are released quantized")
        drafter = draft_configs.dspark(config, block_size=block_length)
        return described(DenseDecoder, config), described(DSparkDrafter, drafter)
    target = described(DeepSeekV4, config)
    stages = described(DeepSeekV4DSpark, draft_configs.deepseek_v4_dspark(config))
    if quantized:
        target = _as_stored(target, partial(target_plan, config, released=True))
        stages = _as_stored(stages, draft_plan)
    return target, stages


def _as_stored(
    model: Any, plan_of: Callable[[Mapping[str, tuple[int, ...]]], Plan]
) -> Any:
    """The model with its matrices in the blocks that released files keep them in."""
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    shapes = {".".join(map(str, path)): tuple(v.shape) for path, v in flat}
    plan, kept = plan_of(shapes), []
    for path, variable in flat:
        name = ".".join(map(str, path))
        kinds = {storage(piece.name) for piece in plan[name]}
        if kinds <= {"fp4"} or kinds <= {"fp8"}:
            turned = turns_over(name, *variable.shape[-2:])
            variable = variable.replace(_blocks(variable, kinds == {"fp4"}, turned))
        kept.append((path, variable))
    return nnx.merge(graph, nnx.from_flat_state(kept))


def _blocks(variable: Any, fp4: bool, turned: bool) -> Quantized:
    *lead, rows, columns = variable.shape
    if fp4:
        elements, kind = (rows, columns // 2), jnp.int8
        scales = rows, columns // blocks.FP4_BLOCK
    else:
        elements, kind = (rows, columns), blocks.FP8
        scales = blocks.fp8_scale_shape(rows, columns)
    if turned:
        elements, kind = elements[::-1], jnp.uint8 if fp4 else FP8
        scales = scales[1], rows
    described: Any = jax.ShapeDtypeStruct
    return (Transposed if turned else Quantized)(
        described((*lead, *elements), kind),
        described((*lead, *scales), jnp.uint8),
        variable.dtype,
    )
