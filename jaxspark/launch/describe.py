"""What a model weighs, without allocating it.

  jaxspark describe --config=deepseek_v4_flash
  jaxspark describe --config=deepseek_v4_pro --context=4096,1048576 \
      --json_out=pro.json

Parameters in all and per token, cache bytes per token by part, operations per token at
some context lengths and, for DeepSeek-V4, the tensors of its released files. Names are
those of `jaxspark.configs.targets`.
"""

import inspect
from dataclasses import dataclass

from rich.table import Table

from jaxspark.configs import targets as target_configs
from jaxspark.configuration import Configuration, option
from jaxspark.figures import write_figures
from jaxspark.launch import common, program
from jaxspark.models import DeepSeekV4Config
from jaxspark.simulation.footprint import V32_BYTES_PER_TOKEN, footprint
from jaxspark.simulation.footprint_report import report
from jaxspark.simulation.released import released_files

PRESETS = {
    name: make
    for name, make in inspect.getmembers(target_configs, inspect.isfunction)
    if make.__module__ == target_configs.__name__
}


@dataclass(frozen=True, kw_only=True)
class Config(Configuration):
    """What to weigh."""

    config: str = option("Architecture.", "deepseek_v4_flash", choices=sorted(PRESETS))
    context: tuple[int, ...] = option(
        "Context lengths.", (4096, 131072, 1048576), at_least=1
    )
    json_out: str | None = common.json_option()


def main(config: Config) -> None:
    """Weighs one architecture."""
    console = common.console()
    architecture = PRESETS[config.config]()
    weighed = footprint(architecture, config.context)
    report(console, config.config, weighed)
    figures = {"config": config.config, **weighed.as_json()}
    if isinstance(architecture, DeepSeekV4Config):
        table = Table(title="released files")
        for column in ("", "tensors", "bytes", "parameters"):
            table.add_column(column, justify="right")
        figures["released"] = released_files(architecture)
        for name, each in figures["released"].items():
            table.add_row(name, *(f"{value:,}" for value in each.values()))
        console.print(table)
        longest = max(config.context)
        mine = sum(weighed.cache["released"].values())
        mine += weighed.state["released"] / longest
        share = mine / V32_BYTES_PER_TOKEN
        figures["cache_against_v32"] = {"context": longest, "share": share}
        console.print(
            f"at {longest:,} tokens the cache takes {100 * share:.1f} % of "
            f"DeepSeek-V3.2's {V32_BYTES_PER_TOKEN:,} bytes per token (61 layers of "
            "656 bytes of latent and 132 of index key)"
        )
    if config.json_out:
        write_figures(config.json_out, figures)


if __name__ == "__main__":
    program.run(main, Config)
