"""Measures a drafter: accepted length, acceptance by place, tokens per second.

  jaxspark evaluate --draft=runs/dspark/drafter
  jaxspark evaluate --draft=hybrid:runs/dspark/drafter --temperature=1
  jaxspark evaluate --draft=... --json_out=dspark.json --plot=dspark.png
  jaxspark evaluate --draft=dspark --temperature=1 --thresholds=0,0.3,0.6

Prompts are 20 of each domain that come with jaxspark, or those of --prompts_dir: JSON
lines with `turns`, one file <domain>_prompts.jsonl per domain.
"""

from dataclasses import asdict, dataclass
from typing import Any

import jax

from jaxspark import load_drafter
from jaxspark.benchmark.sequences import speeds
from jaxspark.calibration.schedules import find_calibration
from jaxspark.configuration import option
from jaxspark.decoding.options import check_block_length
from jaxspark.evaluation.acceptance import measure_acceptance
from jaxspark.evaluation.plots import plot_acceptance
from jaxspark.evaluation.prompts import PromptOptions
from jaxspark.evaluation.report import averaged, report, report_thresholds
from jaxspark.evaluation.thresholds import plot_thresholds, sweep_thresholds
from jaxspark.figures import write_figures
from jaxspark.launch import common, program


@dataclass(frozen=True, kw_only=True)
class Config(
    common.TargetOptions,
    common.DraftOptions,
    PromptOptions,
    common.CouplingOptions,
):
    """What to measure."""

    prompts_per_domain: int = option("Prompts per domain.", 20, at_least=1)
    max_prompt_tokens: int = option(
        "Longest prompt; longer ones are passed over.", 256, at_least=1
    )
    max_new_tokens: int = option("Output budget.", 128, at_least=1)
    temperature: float = option(
        "Sampling temperature; 0 decodes greedily.", 0.0, at_least=0
    )
    slots: int = option("Prompts decoded together for acceptance.", 8, at_least=1)
    seed: int = option("Seed of sampling.", 0)
    speed_prompts: int = option(
        "Prompts per domain timed alone; 0: none.", 2, at_least=0
    )
    speed_tokens: int = option("Tokens per timed run.", 64, at_least=8)
    repeats: int = option("Timed runs of each contestant.", 3, at_least=1)
    json_out: str | None = common.json_option()
    plot: str | None = option("PNG of conditional acceptance by position.", None)
    thresholds: tuple[float, ...] = option(
        "Verify only drafts of at least this survival, each in turn (Figure 5).",
        (),
        at_least=0,
        at_most=1,
    )


def main(config: Config) -> None:
    """Measures and reports."""
    console = common.console()
    target, tokenizer = config.load()
    drafter = load_drafter(config.draft, target)
    block_length = check_block_length(drafter, config.block_length)
    prompts = config.read_prompts(
        tokenizer,
        per_domain=config.prompts_per_domain,
        max_tokens=config.max_prompt_tokens,
    )
    options: dict[str, Any] = {
        "block_length": block_length,
        "temperature": config.temperature,
        "max_new_tokens": config.max_new_tokens,
        "slots": config.slots,
        "coupling": config.coupling,
        "seed": config.seed,
    }
    with console.status("decoding all prompts"):
        accepted = measure_acceptance(target, drafter, prompts, **options)
    domains = {name: asdict(each) for name, each in accepted.items()}
    if config.speed_prompts:
        for name, figures in domains.items():
            with console.status(f"timing {name}"):
                figures |= speeds(
                    target,
                    drafter,
                    prompts[name][: config.speed_prompts],
                    block_length=block_length,
                    new_tokens=config.speed_tokens,
                    max_prompt_tokens=config.max_prompt_tokens,
                    coupling=config.coupling,
                    temperature=config.temperature,
                    repeats=config.repeats,
                )
    average = averaged(list(domains.values()))
    title = f"{target.name} · {config.draft} · temperature {config.temperature:g}"
    report(console, title, domains | {"average": average})
    settings = ("draft", "dtype", "temperature", "coupling", "max_new_tokens")
    result = {
        "target": target.name,
        "block_length": block_length,
        **config.recorded(settings),
        "prompts_per_domain": config.prompts_per_domain,
        "prompts_used": {name: len(each) for name, each in prompts.items()},
        "device": jax.devices()[0].device_kind,
        "domains": domains,
        "macro_average": average,
    }
    if config.thresholds:
        calibration = find_calibration(config.draft, config.coupling)
        found = sweep_thresholds(
            console, target, drafter, prompts, config.thresholds, calibration, **options
        )
        report_thresholds(console, config.draft, found)
        result["thresholds"] = {
            name: {f"{t:g}": each for t, each in points.items()}
            for name, points in found.items()
        }
        if config.json_out:
            path = config.json_out.removesuffix(".json") + "_thresholds.png"
            title = f"{config.draft}, temperature {config.temperature:g}"
            plot_thresholds(path, found, title=title)
    if config.json_out:
        write_figures(config.json_out, result)
    if config.plot:
        plot_acceptance(config.plot, {config.draft: average["conditional_acceptance"]})


if __name__ == "__main__":
    program.run(main, Config)
