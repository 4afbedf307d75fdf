"""What DeepSeek-V4's released files hold, counted without them."""

import math

from jaxspark.checkpoints.deepseek_v4 import draft_plan, target_plan
from jaxspark.checkpoints.deepseek_v4_released import inventory
from jaxspark.configs import drafters as draft_configs
from jaxspark.drafters import DeepSeekV4DSpark, MTPDrafter
from jaxspark.models import DeepSeekV4, DeepSeekV4Config
from jaxspark.simulation.footprint import parameter_shapes


def released_files(config: DeepSeekV4Config) -> dict[str, dict[str, int]]:
    """Tensors, bytes and parameters of the released layout, by what it holds."""
    drafter = draft_configs.deepseek_v4_dspark(config)
    shapes = parameter_shapes(DeepSeekV4, config)
    target = target_plan(config, shapes, released=True)
    mtp = draft_plan(parameter_shapes(MTPDrafter, config))
    stages = draft_plan(parameter_shapes(DeepSeekV4DSpark, drafter))
    found = {}
    for name, plan in (
        ("backbone", target),
        ("backbone and MTP", target | {f"mtp {k}": v for k, v in mtp.items()}),
        ("DSpark stages", stages),
    ):
        shapes = {piece.name: piece.shape for part in plan.values() for piece in part}
        files = inventory(shapes)
        found[name] = {
            "tensors": len(files),
            "bytes": sum(each.nbytes for each in files.values()),
            "parameters": sum(
                math.prod(shape)
                for tensor, shape in shapes.items()
                if not tensor.endswith("tid2eid")
            ),
        }
    return found
