r"""Draws what `jaxspark evaluate --json_out` measured.

  jaxspark plot --results=dspark.json,dflash.json --out=acceptance.png
  jaxspark plot --results=depth1.json,depth2.json --out=depth.png \
      --x=depth --at=1,2                    accepted length over anything

Without --x it draws conditional acceptance by place.
"""

import json
import pathlib
from collections import Counter
from dataclasses import dataclass

from jaxspark.configuration import Configuration, option
from jaxspark.evaluation.plots import plot_acceptance, plot_lines
from jaxspark.launch import program


@dataclass(frozen=True, kw_only=True)
class Config(Configuration):
    """What to draw."""

    results: tuple[str, ...] = option("Files of jaxspark evaluate.")
    names: tuple[str, ...] | None = option(
        "What to call them; by default their file names.", None
    )
    out: str = option("PNG file.")
    x: str | None = option("Draw accepted length by domain over this quantity.", None)
    at: tuple[float, ...] | None = option("Value of --x for each file.", None)
    title: str = option("Title of the plot.", "")

    def __post_init__(self):
        super().__post_init__()
        if (self.x is None) != (self.at is None):
            raise ValueError("--x needs --at, one value per result, and --at needs --x")
        for name, values in (("names", self.labels), ("at", self.at or ())):
            if values and len(values) != len(self.results):
                raise ValueError(
                    f"{len(self.results)} results, but {len(values)} {name}"
                )
            repeated = [str(each) for each, n in Counter(values).items() if n > 1]
            if repeated:
                raise ValueError(
                    f"--{name} must differ, got {', '.join(repeated)} more than once"
                )

    @property
    def labels(self) -> tuple[str, ...]:
        """What each result is called."""
        return self.names or tuple(pathlib.Path(path).stem for path in self.results)


def main(config: Config) -> None:
    """Reads and draws."""
    results = [json.loads(pathlib.Path(path).read_text()) for path in config.results]
    if config.at is None:
        curves = {
            name: [
                rate or 0.0 for rate in each["macro_average"]["conditional_acceptance"]
            ]
            for name, each in zip(config.labels, results)
        }
        plot_acceptance(config.out, curves, title=config.title)
        return
    lines = {
        domain: {
            value: each["domains"][domain]["accepted_length"]
            for value, each in zip(config.at, results)
        }
        for domain in results[0]["domains"]
    }
    plot_lines(
        config.out,
        lines,
        xlabel=str(config.x),
        ylabel="accepted length",
        title=config.title,
    )


if __name__ == "__main__":
    program.run(main, Config)
