r"""Calibrates a drafter's confidences, and shows how reliable they are.

  jaxspark calibrate --draft=runs/dspark/drafter --out=runs/calibration
  jaxspark calibrate --draft=runs/dspark/drafter --out=runs/calibration \
      --data=math.jsonl,code.jsonl --prompts_dir=prompts --test_prompts=60

Decodes questions (those that come with jaxspark, or of --data: JSON lines with
`messages`) and records what the drafter expected and what was accepted; fits, at each
sampling temperature, one temperature per draft (sequential temperature scaling), then a
bias too, then what the draft's certainty counts too; and judges each on other prompts,
beside what an estimator would have said that learned while it decoded these.
Writes the last fit (see --keep) beside the drafter's weights, and <out>/<name>.json and
.png with calibration error, ranking and Brier score before and after. Recorded rounds
stay in --out and are used again.
"""

import pathlib
from dataclasses import dataclass

from jaxspark import load_drafter
from jaxspark.calibration.files import save_calibration
from jaxspark.calibration.recorded_rounds import kept_rounds
from jaxspark.calibration.replay import replayed
from jaxspark.calibration.report import LEARNED, report_reliability
from jaxspark.calibration.temperatures import assess_logits
from jaxspark.calibration.variants import VARIANTS, as_calibration, fit_variants
from jaxspark.checkpoints.folders import sha256
from jaxspark.checkpoints.load import drafter_folder
from jaxspark.configuration import option
from jaxspark.decoding.options import check_block_length
from jaxspark.evaluation.plots import plot_reliability
from jaxspark.evaluation.prompts import CALIBRATION, PromptOptions, in_turn
from jaxspark.figures import write_figures
from jaxspark.jsonlines import check_settings
from jaxspark.launch import common, program
from jaxspark.training.data.selection import first_questions


@dataclass(frozen=True, kw_only=True)
class Config(
    common.TargetOptions,
    common.DraftOptions,
    PromptOptions,
    common.CouplingOptions,
):
    """Whose confidences to calibrate, and on what."""

    draft: str = common.draft_option("dspark")
    data: tuple[str, ...] | None = option(
        "JSON lines whose questions are decoded for the fit; by default those that "
        "come with jaxspark, 64 of each domain.",
        None,
    )
    out: str = option("Folder for recorded rounds and figures.")
    fit_prompts: int = option("Questions of --data decoded.", 192, at_least=1)
    test_prompts: int = option("Prompts per domain to evaluate on.", 20, at_least=1)
    max_prompt_tokens: int = option(
        "Longest prompt; longer ones are passed over.", 256, at_least=1
    )
    max_new_tokens: int = option("Output budget.", 96, at_least=1)
    temperatures: tuple[float, ...] = option(
        "Sampling temperatures to fit at.", (0.0, 1.0), at_least=0
    )
    keep: str = option(
        "What is kept with the drafter: temperatures alone, biases too, certainty too.",
        "certainty",
        choices=tuple(VARIANTS),
        renamed={"sharpness": "certainty"},
    )
    slots: int = option("Prompts decoded together.", 32, at_least=1)
    save: bool = option("Write the fit beside the drafter's weights.", True)


def main(config: Config) -> None:
    """Records, fits, evaluates, reports."""
    console = common.console()
    target, tokenizer = config.load()
    drafter = load_drafter(config.draft, target)
    block_length = check_block_length(drafter, config.block_length)
    fit_prompts = first_questions(
        tokenizer,
        config.data or CALIBRATION,
        most=config.fit_prompts,
        max_tokens=config.max_prompt_tokens,
    )
    domains = config.read_prompts(
        tokenizer,
        per_domain=config.test_prompts,
        max_tokens=config.max_prompt_tokens,
    )
    test_prompts = in_turn(domains)
    out = pathlib.Path(config.out)
    names = ("draft", "target", "dtype", "data", "fit_prompts", "prompts_dir",
             "test_prompts", "max_prompt_tokens", "max_new_tokens",
             "slots")  # fmt: skip
    folder, _ = drafter_folder(config.draft)
    weights = [sha256(path) for path in sorted(folder.glob("*.safetensors"))]
    settings = {"block_length": block_length, "weights": weights}
    check_settings(out / "settings.json", config.recorded(names) | settings)
    results, fitted = {}, {}
    for temperature in sorted(config.temperatures):
        # Fit and test draw other random numbers.
        fit, test = (
            kept_rounds(
                console,
                out,
                part,
                target,
                drafter,
                prompts,
                temperature=temperature,
                coupling=config.coupling,
                max_new_tokens=config.max_new_tokens,
                block_length=config.block_length,
                slots=config.slots,
                seed=seed,
            )
            for part, prompts, seed in (
                ("fit", fit_prompts, 0),
                ("test", test_prompts, 2**20),
            )
        )
        scalings, assessed = fit_variants(fit, test)
        figures = {"fit_rounds": len(fit), "test_rounds": len(test)} | {
            way: scaling.lists() | assessed[way] for way, scaling in scalings.items()
        }
        logits_NG, _ = replayed(test, sampled=temperature > 0)
        figures[LEARNED] = assess_logits(test, logits_NG)
        results[f"{temperature:g}"] = figures
        title = f"{config.draft} · {config.coupling} · temperature {temperature:g}"
        fitted[temperature] = scalings[config.keep], fit
        report_reliability(console, title, figures)
        plot_reliability(
            out / f"reliability_{config.coupling}_{temperature:g}.png",
            {way: each["curve"] for way, each in assessed.items()},
        )
    write_figures(out / f"calibration_{config.coupling}.json", results)
    if config.save:
        calibration = as_calibration(config.coupling, fitted)
        console.print(f"wrote {save_calibration(config.draft, calibration)}")


if __name__ == "__main__":
    program.run(main, Config)
