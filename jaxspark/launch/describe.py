"""What a model weighs, without allocating it.

  jaxspark describe --config=deepseek_v4_flash
  jaxspark describe --config=deepseek_v4_pro --context=4096,1048576 \
      --json_out=pro.json

Parameters in all and per token, cache bytes per token by part, operations per token at
some context lengths and, for DeepSeek-V4, the tensors of its released files. Names are
those of `jaxspark.configs.targets`.
"""

import inspect
import math

from absl import flags
from rich.console import Console
from rich.table import Table

from jaxspark.checkpoints.deepseek_v4 import draft_plan, target_plan
from jaxspark.checkpoints.deepseek_v4_released import inventory
from jaxspark.configs import drafters as draft_configs
from jaxspark.configs import targets as target_configs
from jaxspark.drafters import DeepSeekV4DSpark, MTPDrafter
from jaxspark.launch import common, program
from jaxspark.models import DeepSeekV4, DeepSeekV4Config
from jaxspark.simulation.footprint import (
    V32_BYTES_PER_TOKEN,
    Footprint,
    footprint,
    parameter_shapes,
)

PRESETS = {
    name: make
    for name, make in inspect.getmembers(target_configs, inspect.isfunction)
    if make.__module__ == target_configs.__name__
}
flags.DEFINE_enum("config", "deepseek_v4_flash", sorted(PRESETS), "Architecture.")
flags.DEFINE_list("context", ["4096", "131072", "1048576"], "Context lengths.")
flags.DEFINE_string("json_out", None, "File for the figures.")
FLAGS = flags.FLAGS


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


def report(console: Console, weighed: Footprint) -> None:
    """The tables."""
    table = Table(title=f"{FLAGS.config} · parameters")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    for part, count in weighed.parameters.items():
        table.add_row(part, f"{count:,}")
    table.add_section()
    table.add_row("total", f"{weighed.total:,}")
    table.add_row("active per token", f"{weighed.active:,}")
    console.print(table)
    table = Table(title="cache")
    for column in ("storage", "part", "bytes per token"):
        table.add_column(column, justify="right" if column[0] == "b" else "left")
    for storage, parts in weighed.cache.items():
        for part, size in parts.items():
            table.add_row(storage, part, f"{size:,.1f}")
        table.add_row(storage, "total", f"{sum(parts.values()):,.1f}")
        table.add_row(storage, "per request", f"{weighed.state[storage]:,} in all")
        table.add_section()
    console.print(table)
    table = Table(title="operations per token")
    for column in ("context", "GFLOP", "of which attention"):
        table.add_column(column, justify="right")
    for context, flops in weighed.flops.items():
        share = 1 - 2 * weighed.active / flops
        table.add_row(f"{context:,}", f"{flops / 1e9:,.1f}", f"{100 * share:.1f} %")
    console.print(table)


def main() -> None:
    """Weighs one architecture."""
    console = Console()
    config = PRESETS[FLAGS.config]()
    weighed = footprint(config, tuple(map(int, FLAGS.context)))
    report(console, weighed)
    figures = {"config": FLAGS.config, **weighed.as_json()}
    if isinstance(config, DeepSeekV4Config):
        table = Table(title="released files")
        for column in ("", "tensors", "bytes", "parameters"):
            table.add_column(column, justify="right")
        figures["released"] = released_files(config)
        for name, each in figures["released"].items():
            table.add_row(name, *(f"{value:,}" for value in each.values()))
        console.print(table)
        longest = max(map(int, FLAGS.context))
        mine = sum(weighed.cache["released"].values())
        mine += weighed.state["released"] / longest
        share = mine / V32_BYTES_PER_TOKEN
        figures["cache_against_v32"] = {"context": longest, "share": share}
        console.print(
            f"at {longest:,} tokens the cache takes {100 * share:.1f} % of "
            f"DeepSeek-V3.2's {V32_BYTES_PER_TOKEN:,} bytes per token (61 layers of "
            "656 bytes of latent and 132 of index key)"
        )
    if FLAGS.json_out:
        common.write_figures(FLAGS.json_out, figures)


if __name__ == "__main__":
    program.run(main)
