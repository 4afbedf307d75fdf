"""Measures a drafter: accepted length, acceptance by place, tokens per second.

  jaxspark evaluate --draft=runs/dspark/drafter
  jaxspark evaluate --draft=hybrid:runs/dspark/drafter --temperature=1
  jaxspark evaluate --draft=... --json_out=dspark.json --plot=dspark.png
  jaxspark evaluate --draft=dspark --temperature=1 --thresholds=0,0.3,0.6

Prompts are 20 of each domain that come with jaxspark, or those of --prompts_dir: JSON
lines with `turns`, one file <domain>_prompts.jsonl per domain.
"""

from dataclasses import asdict

import jax
from absl import flags
from rich.console import Console
from rich.table import Table

from jaxspark import load_drafter
from jaxspark.benchmark.sequences import decode_seconds
from jaxspark.decoding import DecodeOptions, Threshold
from jaxspark.decoding.generate import (
    check_block_length,
    default_buckets,
    round_capacity,
)
from jaxspark.drafters import PlainDrafter
from jaxspark.evaluation.acceptance import macro_average, measure_acceptance
from jaxspark.evaluation.plots import plot_acceptance, plot_lines
from jaxspark.launch import common, program
from jaxspark.launch.progress import bars
from jaxspark.timing import alternate, medians

common.define_model_flags()
common.define_prompts_flag()
flags.DEFINE_integer("prompts_per_domain", 20, "Prompts per domain.", lower_bound=1)
flags.DEFINE_integer(
    "max_prompt_tokens", 256, "Longer ones are passed over.", lower_bound=1
)
flags.DEFINE_integer("max_new_tokens", 128, "Output budget.", lower_bound=1)
flags.DEFINE_float("temperature", 0.0, "0 decodes greedily.", lower_bound=0.0)
common.define_coupling_flag()
flags.DEFINE_integer(
    "slots", 8, "Prompts decoded together for acceptance.", lower_bound=1
)
flags.DEFINE_integer("seed", 0, "Of sampling.")
flags.DEFINE_integer(
    "speed_prompts", 2, "Prompts per domain timed alone; 0: none.", lower_bound=0
)
flags.DEFINE_integer("speed_tokens", 64, "Tokens per timed run.", lower_bound=8)
flags.DEFINE_integer("repeats", 3, "Timed runs of each contestant.", lower_bound=1)
flags.DEFINE_string("json_out", None, "File for the figures.")
flags.DEFINE_string("plot", None, "PNG of conditional acceptance by place.")
flags.DEFINE_list(
    "thresholds",
    [],
    "Verify only drafts of at least this survival, each in turn (Figure 5).",
)
FLAGS = flags.FLAGS


def sweep(console: Console, target, drafter, prompts, options, thresholds) -> dict:
    """Acceptance rate and verified length of every domain, by threshold."""
    calibration = common.find_calibration()
    found: dict[str, dict] = {name: {} for name in prompts}
    with bars(console) as progress:
        for text, schedule in progress.track(
            thresholds.items(), description="verifying by survival"
        ):
            measured = measure_acceptance(
                target,
                drafter,
                prompts,
                schedule=schedule,
                calibration=calibration,
                **options,
            )
            for name, each in measured.items():
                found[name][text] = {
                    "acceptance_rate": each.acceptance_rate,
                    "verified_length": each.verified_length,
                    "accepted_length": each.accepted_length,
                }
    table = Table(title=f"{FLAGS.draft} · accepted per verified draft (verified)")
    table.add_column("survival")
    for name in found:
        table.add_column(name, justify="right")
    for text in thresholds:
        cells = (each[text] for each in found.values())
        table.add_row(
            text,
            *(
                f"{c['acceptance_rate']:.3f} ({c['verified_length']:.2f})"
                for c in cells
            ),
        )
    console.print(table)
    if FLAGS.json_out:
        plot_lines(
            FLAGS.json_out.removesuffix(".json") + "_thresholds.png",
            {
                name: {float(t): each["acceptance_rate"] for t, each in points.items()}
                for name, points in found.items()
            },
            xlabel="least survival verified",
            ylabel="accepted per verified draft",
            title=f"{FLAGS.draft}, temperature {FLAGS.temperature:g}",
        )
    return found


def speeds(target, drafter, prompts, block_length: int) -> dict[str, float]:
    """Tokens per second of one sequence at a time, plain and drafted in turn."""
    capacity = round_capacity(
        FLAGS.max_prompt_tokens + FLAGS.speed_tokens + block_length
    )

    def contestant(drafter, block_length):
        options = DecodeOptions(
            block_length=block_length,
            coupling=FLAGS.coupling,
            buckets=default_buckets(drafter, 1, block_length, None),
        )

        def run():
            return sum(
                decode_seconds(
                    target.model,
                    drafter,
                    [prompt],
                    new_tokens=FLAGS.speed_tokens,
                    options=options,
                    capacity=capacity,
                    temperature=FLAGS.temperature,
                )[0]
                for prompt in prompts
            )

        return run

    seconds = alternate(
        {
            "plain_tokens_per_second": contestant(PlainDrafter(), 0),
            "tokens_per_second": contestant(drafter, block_length),
        },
        FLAGS.repeats,
    )
    tokens = FLAGS.speed_tokens * len(prompts)
    return {name: tokens / middle for name, middle in medians(seconds).items()}


def main() -> None:
    """Measures and reports."""
    console = Console()
    target = common.load_text_target()
    drafter = load_drafter(FLAGS.draft, target)
    block_length = check_block_length(drafter, FLAGS.block_length)
    thresholds = {text: Threshold(float(text)) for text in FLAGS.thresholds}
    prompts = common.load_domains(
        target.tokenizer,
        per_domain=FLAGS.prompts_per_domain,
        max_tokens=FLAGS.max_prompt_tokens,
    )
    options = {
        "block_length": block_length,
        "temperature": FLAGS.temperature,
        "max_new_tokens": FLAGS.max_new_tokens,
        "slots": FLAGS.slots,
        "coupling": FLAGS.coupling,
        "seed": FLAGS.seed,
    }
    with console.status("decoding all prompts"):
        accepted = measure_acceptance(target, drafter, prompts, **options)
    domains = {name: asdict(each) for name, each in accepted.items()}
    if FLAGS.speed_prompts:
        for name, figures in domains.items():
            with console.status(f"timing {name}"):
                few = prompts[name][: FLAGS.speed_prompts]
                figures |= speeds(target, drafter, few, block_length)
    numbers = [
        name
        for name, value in next(iter(domains.values())).items()
        if isinstance(value, float)
    ]
    average = {
        name: macro_average([figures[name] for figures in domains.values()])
        for name in numbers
    }
    average["conditional_acceptance"] = [
        macro_average(column)
        for column in zip(*(d["conditional_acceptance"] for d in domains.values()))
    ]
    report(console, target, domains | {"average": average})
    settings = ("draft", "dtype", "temperature", "coupling", "max_new_tokens")
    result = {
        "target": target.name,
        "block_length": block_length,
        **{name: FLAGS[name].value for name in settings},
        "prompts_per_domain": FLAGS.prompts_per_domain,
        "prompts_used": {name: len(each) for name, each in prompts.items()},
        "device": jax.devices()[0].device_kind,
        "domains": domains,
        "macro_average": average,
    }
    if FLAGS.thresholds:
        result["thresholds"] = sweep(
            console, target, drafter, prompts, options, thresholds
        )
    if FLAGS.json_out:
        common.write_figures(FLAGS.json_out, result)
    if FLAGS.plot:
        plot_acceptance(FLAGS.plot, {FLAGS.draft: average["conditional_acceptance"]})


def report(console: Console, target, domains: dict) -> None:
    """The table for people."""
    table = Table(
        title=f"{target.name} · {FLAGS.draft} · temperature {FLAGS.temperature:g}"
    )
    titles = {
        "accepted_length": "accepted length",
        "accepted_length_non_looping": "not looping",
        "conditional_acceptance": "accepted at place 1, 2, ...",
        "tokens_per_second": "tokens/s",
        "plain_tokens_per_second": "plain",
    }
    shown = {key: title for key, title in titles.items() if key in domains["average"]}
    table.add_column("")
    for title in shown.values():
        table.add_column(title, justify="right")
    for name, figures in domains.items():
        table.add_row(name, *(_text(figures[key]) for key in shown))
    console.print(table)


def _text(value) -> str:
    if isinstance(value, list):
        return " ".join(f"{each:.2f}" for each in value)
    return f"{value:.2f}"


if __name__ == "__main__":
    program.run(main)
