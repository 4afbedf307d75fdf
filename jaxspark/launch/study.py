r"""Short equal training runs that differ in one thing, evaluated alike.

  jaxspark study --suite=depth --out=studies \
      --train="--data=answers.jsonl --steps=500 --draft_vocab=8192" \
      --evaluate="--prompts_per_domain=10 --max_new_tokens=96"

Suites: drafters, depth, block, head, vocab, taps, init, optimizer. Everything goes on
where it was stopped; a variant that --train spells out already is trained once for
all suites. Writes <out>/<suite>.json, <out>/<suite>.png and prints a table.
"""

import json
import pathlib
import shlex
import subprocess
import sys

from absl import flags
from rich.console import Console
from rich.table import Table

from jaxspark.evaluation.plots import plot_acceptance, plot_lines
from jaxspark.jsonlines import same_settings
from jaxspark.launch import common, program

SUITES = {
    "drafters": {kind: {"drafter": kind} for kind in ("dspark", "dflash", "eagle3")},
    "depth": {n: {"depth": n} for n in ("1", "2", "3")},
    "block": {n: {"block_length": n} for n in ("3", "7", "11", "15")},
    "head": {kind: {"head": kind} for kind in ("vanilla", "gated", "rnn")},
    "init": {kind: {"init": kind} for kind in ("least_squares", "target", "random")},
    "optimizer": {kind: {"optimizer": kind} for kind in ("muon", "adam")},
    "vocab": {
        "8192": {"draft_vocab": "8192"},
        "16384": {"draft_vocab": "16384"},
        "full": {"draft_vocab": None},
    },
    "taps": {taps: {"taps": taps} for taps in ("28", "8,22,28", "1,8,15,22,28")},
}
# Evaluated only: prompt lookup beside a trained variant.
HYBRIDS = {"drafters": {"hybrid": "dspark"}}
# Suites over a number are drawn over it (Figures 3 and 4), the others by place.
NUMBERS = {"depth": "draft layers", "block": "block length"}

flags.DEFINE_enum("suite", None, list(SUITES), "What differs.")
flags.DEFINE_string("out", None, "Folder of the study.")
flags.DEFINE_string(
    "train", "", "Flags of jaxspark train_draft for all runs, each --name=value."
)
flags.DEFINE_string("evaluate", "", "Flags of jaxspark evaluate for all runs.")
flags.DEFINE_list("temperatures", ["0", "1"], "Evaluated temperatures.")
flags.mark_flags_as_required(["suite", "out"])
FLAGS = flags.FLAGS


def run(launcher: str, *arguments: str) -> None:
    """Runs a launcher; its output is this program's.

    Raises:
      ValueError: it failed.
    """
    done = subprocess.run([sys.executable, "-m", "jaxspark", launcher, *arguments])
    if done.returncode:
        raise ValueError(
            f"jaxspark {launcher} failed with exit status {done.returncode}"
        )


def folder(variant: str, changes: dict) -> pathlib.Path:
    """Where a variant's run and figures are: one place for what changes nothing."""
    shared = train_flags()
    if all(shared.get(name) == value for name, value in changes.items()):
        return pathlib.Path(FLAGS.out) / "base"
    return pathlib.Path(FLAGS.out) / FLAGS.suite / variant


def train_flags() -> dict[str, str]:
    """What --train says, by flag."""
    pairs = (each.removeprefix("--") for each in shlex.split(FLAGS.train))
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


def train(where: pathlib.Path, changes: dict) -> str:
    """Trains one variant; returns what evaluation loads."""
    out = where / "run"
    chosen = train_flags() | changes | {"out": out}
    run("train_draft", *(f"--{n}={v}" for n, v in chosen.items() if v is not None))
    return str(out / "drafter")


def evaluate(where: pathlib.Path, draft: str) -> dict:
    """Figures of one variant by temperature."""
    figures = {}
    same_settings(where / "evaluate.json", {"evaluate": FLAGS.evaluate})
    for temperature in FLAGS.temperatures:
        path = where / f"temperature_{temperature}.json"
        if not path.exists():
            run(
                "evaluate",
                f"--draft={draft}",
                f"--temperature={temperature}",
                f"--json_out={path}",
                *shlex.split(FLAGS.evaluate),
            )
        figures[temperature] = json.loads(path.read_text())
    return figures


def main() -> None:
    """Runs what is missing, then reports."""
    console = Console()
    drafts, results = {}, {}
    for variant, changes in SUITES[FLAGS.suite].items():
        console.rule(f"{FLAGS.suite}: {variant}", align="left", style="dim")
        where = folder(variant, changes)
        drafts[variant] = train(where, changes)
        results[variant] = evaluate(where, drafts[variant])
    for variant, trained in HYBRIDS.get(FLAGS.suite, {}).items():
        console.rule(f"{FLAGS.suite}: {variant}", align="left", style="dim")
        where = pathlib.Path(FLAGS.out) / FLAGS.suite / variant
        results[variant] = evaluate(where, f"hybrid:{drafts[trained]}")
    table = Table(title=f"{FLAGS.suite}: accepted length")
    table.add_column(FLAGS.suite)
    for temperature in FLAGS.temperatures:
        for domain in ("math", "code", "chat", "average"):
            table.add_column(f"{domain}, {temperature}", justify="right")
    table.add_column("tokens/s", justify="right")
    first = FLAGS.temperatures[0]
    # Greedy outputs loop; lengths without them say more.
    key = "accepted_length_non_looping"
    for variant, figures in results.items():
        cells = []
        for each in figures.values():
            rows = [*each["domains"].values(), each["macro_average"]]
            cells += [f"{row[key] or float('nan'):.2f}" for row in rows]
        speed = figures[first]["macro_average"].get("tokens_per_second")
        table.add_row(variant, *cells, f"{speed:.1f}" if speed else "")
    console.print(table)
    out = pathlib.Path(FLAGS.out) / FLAGS.suite
    common.write_figures(out.with_suffix(".json"), results)
    averages = {v: each[first]["macro_average"] for v, each in results.items()}
    if FLAGS.suite in NUMBERS:
        lines = {
            f"temperature {temperature}": {
                float(variant): each[temperature]["macro_average"][key]
                for variant, each in results.items()
            }
            for temperature in FLAGS.temperatures
        }
        plot_lines(
            out.with_suffix(".png"),
            lines,
            xlabel=NUMBERS[FLAGS.suite],
            ylabel="accepted length",
        )
    else:
        curves = {
            variant: [rate or 0.0 for rate in average["conditional_acceptance"]]
            for variant, average in averages.items()
        }
        plot_acceptance(out.with_suffix(".png"), curves)


if __name__ == "__main__":
    program.run(main)
