r"""Calibrates a drafter's confidences, and shows how reliable they are.

  python -m launch.calibrate --draft=dspark --out=runs/calibration \
      --data=math_heldout.jsonl,code_heldout.jsonl,chat_heldout.jsonl

Decodes the questions of --data (JSON lines with `messages`) and records what the
drafter expected and what was accepted; fits one temperature per draft (sequential
temperature scaling) and one bias at each sampling temperature; and judges them on other
prompts, those of --prompts_dir. Writes both beside the drafter's weights, and
<out>/<name>.json and .png with calibration error, ranking and Brier score before and
after. Recorded rounds stay in --out and are used again.
"""

import itertools
import pathlib

import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from jaxspark import load_drafter
from jaxspark.calibration.files import save_calibration
from jaxspark.calibration.rounds import Rounds, record_rounds
from jaxspark.calibration.temperatures import assess, fit_temperatures
from jaxspark.checkpoints.folders import sha256
from jaxspark.checkpoints.load import drafter_folder
from jaxspark.decoding import Calibration
from jaxspark.decoding.generate import check_block_length
from jaxspark.evaluation.plots import plot_reliability
from jaxspark.evaluation.prompts import in_turn, load_prompts
from jaxspark.jsonlines import same_settings
from jaxspark.training.data import Conversation, read_conversations
from launch import common

common.define_model_flags(draft="dspark")
flags.DEFINE_list("data", None, "JSON lines whose questions are decoded for the fit.")
flags.DEFINE_string("prompts_dir", "../shared/data/eval", "Judge the fit by these.")
flags.DEFINE_string("out", None, "Folder for recorded rounds and figures.")
flags.DEFINE_integer("fit_prompts", 192, "Questions of --data decoded.", lower_bound=1)
flags.DEFINE_integer("test_prompts", 40, "Prompts per domain to judge.", lower_bound=1)
flags.DEFINE_integer("max_prompt_tokens", 256, "Longer ones are passed over.")
flags.DEFINE_integer("max_new_tokens", 96, "Output budget.", lower_bound=1)
flags.DEFINE_list("temperatures", ["0", "1"], "Sampling temperatures to fit at.")
flags.DEFINE_enum(
    "coupling", "rejection", ["rejection", "gumbel"], "See launch.generate."
)
flags.DEFINE_bool("bias", True, "Keep biases beside temperatures.")
flags.DEFINE_integer("slots", 32, "Prompts decoded together.", lower_bound=1)
flags.DEFINE_bool("save", True, "Write both beside the drafter's weights.")
flags.mark_flags_as_required(["data", "out"])
FLAGS = flags.FLAGS
WAYS = ("before", "temperatures", "biases too")


def questions(tokenizer) -> list[list[int]]:
    """First questions of --data as token ids, file by file in turn.

    Raises:
      ValueError: there are too few.
    """
    columns = []
    for source in FLAGS.data:
        rows = [r for r in read_conversations([source]) if isinstance(r, Conversation)]
        columns.append([_first_question(tokenizer, row) for row in rows])
    turns = itertools.zip_longest(*columns)
    fitting = [
        ids
        for turn in turns
        for ids in turn
        if ids is not None and len(ids) <= FLAGS.max_prompt_tokens
    ]
    if len(fitting) < FLAGS.fit_prompts:
        raise ValueError(
            f"--data has {len(fitting)} questions of at most {FLAGS.max_prompt_tokens} "
            f"tokens, --fit_prompts={FLAGS.fit_prompts}"
        )
    return fitting[: FLAGS.fit_prompts]


def _first_question(tokenizer, row: Conversation) -> list[int] | None:
    asked = itertools.takewhile(lambda m: m["role"] != "assistant", row.messages)
    messages = list(asked)
    return tokenizer.chat(messages) if messages else None


def recorded(
    console: Console, target, drafter, part: str, temperature: float, prompts
) -> Rounds:
    """The rounds of some prompts: from an earlier run, or decoded now."""
    path = pathlib.Path(FLAGS.out) / f"{part}_{FLAGS.coupling}_{temperature:g}.npz"
    if path.exists():
        return Rounds.load(path)
    progress = Progress(
        *Progress.get_default_columns()[:2],
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    with progress:
        title = f"{part}, temperature {temperature:g}"
        task = progress.add_task(title, total=len(prompts))
        rounds = record_rounds(
            target,
            drafter,
            prompts,
            max_new_tokens=FLAGS.max_new_tokens,
            block_length=FLAGS.block_length,
            temperature=temperature,
            coupling=FLAGS.coupling,
            slots=FLAGS.slots,
            # Fit and test draw other random numbers.
            seed=0 if part == "fit" else 2**20,
            on_group=lambda count: progress.update(task, completed=count),
        )
    rounds.save(path)
    return rounds


def report(console: Console, temperature: float, figures: dict) -> None:
    """The table of one sampling temperature."""
    title = f"{FLAGS.draft} · {FLAGS.coupling} · temperature {temperature:g}"
    table = Table(title=f"{title}: before, with temperatures, with biases too")
    for column in ("", "survived", "ECE", "t", "ECE", "t", "b", "ECE", "AUC", "AUC"):
        table.add_column(column, justify="right", no_wrap=True)
    ways = [figures[name] for name in WAYS]
    for k, survived in enumerate(ways[0]["survived"]):
        ece = [f"{100 * way['ece'][k]:.1f} %" for way in ways]
        t, both = (f"{way['temperatures'][k]:.2f}" for way in ways[1:])
        bias = f"{ways[2]['biases'][k]:+.2f}"
        auc = (f"{way['auc'][k]:.3f}" for way in ways[::2])
        table.add_row(
            str(k + 1), f"{survived:.3f}", ece[0], t, ece[1], both, bias, ece[2], *auc
        )
    table.add_section()
    means = [f"{100 * float(np.mean(way['ece'])):.1f} %" for way in ways]
    table.add_row("", "", means[0], "", means[1], "", "", means[2])
    console.print(table)


def main() -> None:
    """Records, fits, judges, reports."""
    console = Console()
    target = common.load_text_target()
    drafter = load_drafter(FLAGS.draft, target)
    block_length = check_block_length(drafter, FLAGS.block_length)
    fit_prompts = questions(target.tokenizer)
    domains = load_prompts(
        FLAGS.prompts_dir,
        target.tokenizer,
        per_domain=FLAGS.test_prompts,
        max_tokens=FLAGS.max_prompt_tokens,
    )
    test_prompts = in_turn(domains)
    out = pathlib.Path(FLAGS.out)
    names = ("draft", "target", "dtype", "data", "fit_prompts", "prompts_dir",
             "test_prompts", "max_prompt_tokens", "max_new_tokens",
             "slots")  # fmt: skip
    settings = {name: FLAGS[name].value for name in names}
    folder, _ = drafter_folder(FLAGS.draft)
    weights = [sha256(path) for path in sorted(folder.glob("*.safetensors"))]
    settings |= {"block_length": block_length, "weights": weights}
    same_settings(out / "settings.json", settings)
    results, rows = {}, []
    for temperature in sorted(map(float, FLAGS.temperatures)):
        arguments = (console, target, drafter)
        fit = recorded(*arguments, "fit", temperature, fit_prompts)
        test = recorded(*arguments, "test", temperature, test_prompts)
        raw = np.ones(block_length), np.zeros(block_length)
        fits = (raw, fit_temperatures(fit), fit_temperatures(fit, biased=True))
        figures = {"fit_rounds": len(fit), "test_rounds": len(test)}
        for way, (temperatures_G, biases_G) in zip(WAYS, fits):
            figures[way] = {
                "temperatures": temperatures_G.tolist(),
                "biases": biases_G.tolist(),
                **assess(test, temperatures_G, biases_G),
            }
        results[f"{temperature:g}"] = figures
        rows.append((temperature, *fits[2 if FLAGS.bias else 1]))
        report(console, temperature, figures)
        plot_reliability(
            out / f"reliability_{FLAGS.coupling}_{temperature:g}.png",
            {way: figures[way]["curve"] for way in WAYS},
        )
    common.write_figures(out / f"calibration_{FLAGS.coupling}.json", results)
    if FLAGS.save:
        fitted_at, temperatures, biases = zip(*rows)
        calibration = Calibration(
            coupling=FLAGS.coupling,
            fitted_at=fitted_at,
            temperatures=tuple(tuple(each.tolist()) for each in temperatures),
            biases=tuple(tuple(each.tolist()) for each in biases),
        )
        console.print(f"wrote {save_calibration(FLAGS.draft, calibration)}")


if __name__ == "__main__":
    common.run(main)
