r"""Calibrates a drafter's confidences, and shows how reliable they are.

  jaxspark calibrate --draft=runs/dspark/drafter --out=runs/calibration
  jaxspark calibrate --draft=runs/dspark/drafter --out=runs/calibration \
      --data=math.jsonl,code.jsonl --prompts_dir=prompts --test_prompts=60

Decodes questions (those that come with jaxspark, or of --data: JSON lines with
`messages`) and records what the drafter expected and what was accepted; fits, at each
sampling temperature, one temperature per draft (sequential temperature scaling), then a
bias too, then what the draft's sharpness counts too; and judges each on other prompts.
Writes the last (see --keep) beside the drafter's weights, and <out>/<name>.json and
.png with calibration error, ranking and Brier score before and after. Recorded rounds
stay in --out and are used again.
"""

import itertools
import pathlib
import sys

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from jaxspark import load_drafter
from jaxspark.calibration.files import save_calibration
from jaxspark.calibration.rounds import Rounds, record_rounds, typical_blocks
from jaxspark.calibration.temperatures import Scaling, assess, fit_temperatures
from jaxspark.checkpoints.folders import sha256
from jaxspark.checkpoints.load import drafter_folder
from jaxspark.decoding import Calibration
from jaxspark.decoding.generate import check_block_length
from jaxspark.evaluation.plots import plot_reliability
from jaxspark.evaluation.prompts import CALIBRATION, in_turn
from jaxspark.jsonlines import Problem, first_reasons, same_settings
from jaxspark.launch import common, program
from jaxspark.launch.progress import bars
from jaxspark.training.data import Conversation, read_conversations

common.define_model_flags(draft="dspark")
flags.DEFINE_list(
    "data",
    None,
    "JSON lines whose questions are decoded for the fit; by default those that come "
    "with jaxspark, 64 of each domain.",
)
common.define_prompts_flag()
flags.DEFINE_string("out", None, "Folder for recorded rounds and figures.")
flags.DEFINE_integer("fit_prompts", 192, "Questions of --data decoded.", lower_bound=1)
flags.DEFINE_integer("test_prompts", 20, "Prompts per domain to judge.", lower_bound=1)
flags.DEFINE_integer(
    "max_prompt_tokens", 256, "Longer ones are passed over.", lower_bound=1
)
flags.DEFINE_integer("max_new_tokens", 96, "Output budget.", lower_bound=1)
flags.DEFINE_list("temperatures", ["0", "1"], "Sampling temperatures to fit at.")
common.define_coupling_flag()
flags.DEFINE_enum(
    "keep",
    "sharpness",
    ["temperatures", "biases", "sharpness"],
    "What is kept with the drafter: temperatures alone, biases too, sharpness too.",
)
flags.DEFINE_integer("slots", 32, "Prompts decoded together.", lower_bound=1)
flags.DEFINE_bool("save", True, "Write the fit beside the drafter's weights.")
flags.mark_flags_as_required(["out"])
FLAGS = flags.FLAGS
WAYS = {
    "temperatures": {},
    "biases": {"biased": True},
    "sharpness": {"biased": True, "sharpened": True},
}


def questions(tokenizer) -> list[list[int]]:
    """First questions of --data as token ids, file by file in turn.

    As many as there are of --fit_prompts; says where that is fewer, and what was
    dropped.

    Raises:
      ValueError: there is none.
    """
    columns, dropped = [], []
    for source in CALIBRATION if FLAGS.data is None else FLAGS.data:
        column = []
        for row in read_conversations([source]):
            asked = _first_question(tokenizer, row)
            if isinstance(asked, Problem):
                dropped.append(asked)
            elif len(asked) <= FLAGS.max_prompt_tokens:
                column.append(asked)
        columns.append(column)
    turns = itertools.zip_longest(*columns)
    fitting = [ids for turn in turns for ids in turn if ids is not None]
    said = (
        f"--data has {len(fitting)} questions of at most {FLAGS.max_prompt_tokens} "
        f"tokens, --fit_prompts={FLAGS.fit_prompts}"
    )
    if dropped:
        said += f"; {len(dropped)} dropped: {first_reasons(dropped)}"
    if not fitting:
        raise ValueError(said)
    if dropped or len(fitting) < FLAGS.fit_prompts:
        print(said, file=sys.stderr)
    return fitting[: FLAGS.fit_prompts]


def _first_question(tokenizer, row: Conversation | Problem) -> list[int] | Problem:
    if isinstance(row, Problem):
        return row
    asked = list(itertools.takewhile(lambda m: m["role"] != "assistant", row.messages))
    if not asked:
        return Problem(row.where, "no message before the assistant's")
    try:
        return tokenizer.chat(asked, tools=row.tools)
    except Exception as error:  # Templates raise whatever they like.
        return Problem(row.where, str(error))


def recorded(
    console: Console, target, drafter, part: str, temperature: float, prompts
) -> Rounds:
    """The rounds of some prompts: from an earlier run, or decoded now."""
    # Greedy rounds are the same under every coupling.
    kind = f"{FLAGS.coupling}_{temperature:g}" if temperature else "greedy"
    path = pathlib.Path(FLAGS.out) / f"{part}_{kind}.npz"
    if path.exists():
        return Rounds.load(path)
    with bars(console) as progress:
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
    names = ("before", *WAYS)
    for measure, text in (("ece", "calibration error"), ("auc", "ranking (AUC)")):
        table = Table(title=f"{title} · {text}")
        for column in ("draft", "survived", *names):
            table.add_column(column, justify="right", no_wrap=True)
        columns = [figures[name][measure] for name in names]
        for k, row in enumerate(zip(*columns)):
            survived = f"{figures['before']['survived'][k]:.3f}"
            table.add_row(str(k + 1), survived, *(f"{each:.3f}" for each in row))
        table.add_section()
        table.add_row("", "", *(f"{np.mean(column):.3f}" for column in columns))
        console.print(table)


def main() -> None:
    """Records, fits, judges, reports."""
    console = Console()
    target = common.load_text_target()
    drafter = load_drafter(FLAGS.draft, target)
    block_length = check_block_length(drafter, FLAGS.block_length)
    fit_prompts = questions(target.tokenizer)
    domains = common.load_domains(
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
    results, rows = {}, {}
    for temperature in sorted(map(float, FLAGS.temperatures)):
        arguments = (console, target, drafter)
        fit = recorded(*arguments, "fit", temperature, fit_prompts)
        test = recorded(*arguments, "test", temperature, test_prompts)
        fits = {"before": Scaling.identity(block_length)} | {
            way: fit_temperatures(fit, **options) for way, options in WAYS.items()
        }
        judged = {way: assess(test, scaling) for way, scaling in fits.items()}
        figures = {"fit_rounds": len(fit), "test_rounds": len(test)} | {
            way: scaling.lists() | judged[way] for way, scaling in fits.items()
        }
        results[f"{temperature:g}"] = figures
        kept = fits[FLAGS.keep]
        usual = tuple(map(tuple, typical_blocks(kept.survival(fit)).tolist()))
        rows[temperature] = kept.lists() | {"usual": usual}
        report(console, temperature, figures)
        plot_reliability(
            out / f"reliability_{FLAGS.coupling}_{temperature:g}.png",
            {way: each["curve"] for way, each in judged.items()},
        )
    common.write_figures(out / f"calibration_{FLAGS.coupling}.json", results)
    if FLAGS.save:
        calibration = Calibration(
            coupling=FLAGS.coupling,
            fitted_at=tuple(rows),
            **{
                name: tuple(tuple(each[name]) for each in rows.values())
                for name in ("temperatures", "biases", "weights", "usual")
            },
        )
        console.print(f"wrote {save_calibration(FLAGS.draft, calibration)}")


if __name__ == "__main__":
    program.run(main)
