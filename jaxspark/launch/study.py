r"""Short equal training runs that differ in one thing, evaluated alike.

  jaxspark study --suite=depth --out=studies \
      --train="--data=answers.jsonl --steps=500 --draft_vocab=8192" \
      --evaluate="--prompts_per_domain=10 --max_new_tokens=96"

Suites: drafters, depth, block, head, vocab, taps, init, optimizer. Everything goes on
where it was stopped; a variant that --train describes already is trained once for
all suites. Writes <out>/<suite>.json, <out>/<suite>.png and prints a table.
"""

import json
import pathlib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax

from jaxspark.configuration import Configuration, option
from jaxspark.evaluation.comparison import draw, report
from jaxspark.figures import write_figures
from jaxspark.jsonlines import check_settings
from jaxspark.launch import common, evaluate, program, train_draft
from jaxspark.launch.flags import parse

SUITES: dict[str, dict[str, dict[str, Any]]] = {
    "drafters": {kind: {"drafter": kind} for kind in ("dspark", "dflash", "eagle3")},
    "depth": {str(n): {"depth": n} for n in (1, 2, 3)},
    "block": {str(n): {"block_length": n} for n in (3, 7, 11, 15)},
    "head": {kind: {"head": kind} for kind in ("vanilla", "gated", "rnn")},
    "init": {kind: {"init": kind} for kind in ("least_squares", "target", "random")},
    "optimizer": {kind: {"optimizer": kind} for kind in ("muon", "adam")},
    "vocab": {str(n or "full"): {"draft_vocab": n} for n in (8192, 16384, None)},
    "taps": {
        ",".join(map(str, taps)): {"taps": taps}
        for taps in ((28,), (8, 22, 28), (1, 8, 15, 22, 28))
    },
}
# Evaluated only: prompt lookup beside a trained variant.
HYBRIDS = {"drafters": {"hybrid": "dspark"}}


@dataclass(frozen=True, kw_only=True)
class Config(Configuration):
    """What differs between the runs, and what they share."""

    suite: str = option("What differs.", choices=tuple(SUITES))
    out: str = option("Folder of the study.")
    train: str = option(
        "Flags of jaxspark train_draft for all runs, each --name=value.", ""
    )
    evaluate: str = option("Flags of jaxspark evaluate for all runs.", "")
    temperatures: tuple[float, ...] = option(
        "Evaluated temperatures.", (0.0, 1.0), at_least=0
    )


def variants(config: Config) -> Iterator[tuple[str, pathlib.Path, train_draft.Config]]:
    """Name, folder and run of each; one folder for all that change nothing."""
    out = pathlib.Path(config.out)
    arguments = [*shlex.split(config.train), f"--out={out}"]
    shared = parse(train_draft.Config, arguments, "train_draft")
    for name, changes in SUITES[config.suite].items():
        run = replace(shared, **changes)
        where = out / "base" if run == shared else out / config.suite / name
        yield name, where, replace(run, out=str(where / "run"))


def evaluated(config: Config, where: pathlib.Path, draft: str) -> dict[str, dict]:
    """Figures of a drafter by temperature: from an earlier run, or measured now."""
    figures = {}
    alike = parse(evaluate.Config, shlex.split(config.evaluate), "evaluate")
    check_settings(where / "evaluate.json", {"evaluate": config.evaluate})
    for temperature in config.temperatures:
        path = where / f"temperature_{temperature:g}.json"
        if not path.exists():
            evaluate.main(
                replace(alike, draft=draft, temperature=temperature, json_out=str(path))
            )
            jax.clear_caches()
        figures[f"{temperature:g}"] = json.loads(path.read_text())
    return figures


def main(config: Config) -> int:
    """Runs what is missing, then reports."""
    console = common.console()
    drafts, results = {}, {}
    for variant, where, run in variants(config):
        console.rule(f"{config.suite}: {variant}", align="left", style="dim")
        if stopped := train_draft.main(run):
            return stopped
        jax.clear_caches()
        drafts[variant] = f"{run.out}/drafter"
        results[variant] = evaluated(config, where, drafts[variant])
    for variant, trained in HYBRIDS.get(config.suite, {}).items():
        console.rule(f"{config.suite}: {variant}", align="left", style="dim")
        where = pathlib.Path(config.out) / config.suite / variant
        results[variant] = evaluated(config, where, f"hybrid:{drafts[trained]}")
    report(console, config.suite, results)
    out = pathlib.Path(config.out) / config.suite
    write_figures(out.with_suffix(".json"), results)
    draw(out.with_suffix(".png"), config.suite, results)
    return 0


if __name__ == "__main__":
    program.run(main, Config)
