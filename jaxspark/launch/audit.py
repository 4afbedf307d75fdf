"""Audits exactness: speculation must not change a token, nor a distribution.

  jaxspark audit --suite=greedy         guarantee 1, on real prompts
  jaxspark audit --suite=sampling       guarantee 2, enumeration and chi-square
  jaxspark audit --suite=gumbel         guarantee 3, on real prompts
  jaxspark audit --suite=schedules      all three, tiny models: every drafter, schedule,
                                        coupling, bucket set and batch
  jaxspark audit --suite=all            schedules, sampling, and a part of greedy and
                                        gumbel with schedules
  jaxspark audit --suite=quick          a share of schedules, two minutes
  jaxspark audit --suite=settings       that share under every global JAX setting a
                                        program may have chosen
  jaxspark audit --suite=deepseek_v4    everything for DeepSeek-V4 and its drafters,
                                        random weights

Prints violations and near-ties (the two best choices within 1e-4 in float32, where
rounding decides); exits 1 if there is a violation. In bfloat16 the rate of differences
is printed and none is a violation. Long audits keep their progress in
--progress and go on from there.
"""

import time

import jax
from absl import flags
from flax import nnx
from rich.console import Console
from rich.table import Table

from jaxspark import load_drafter
from jaxspark.checkpoints import Target
from jaxspark.configs import drafters as draft_configs
from jaxspark.configs import targets as target_configs
from jaxspark.decoding import Request, parse_schedule
from jaxspark.decoding.generate import round_capacity
from jaxspark.drafters import DeepSeekV4DSpark, DSparkDrafter, MTPDrafter
from jaxspark.exactness import audit_grid, rejection
from jaxspark.exactness.audit import AuditResult, plain_outputs
from jaxspark.exactness.tiny_models import DRAFTERS, Family
from jaxspark.launch import common, program
from jaxspark.launch.audit_report import checked, found, total
from jaxspark.launch.audit_schedules import audit_schedules
from jaxspark.launch.audit_settings import audit_settings
from jaxspark.launch.progress import CellProgress, bars
from jaxspark.launch.workers import collect, compile_workers
from jaxspark.models import DeepSeekV4

common.define_model_flags(draft=None)
flags.DEFINE_enum(
    "suite",
    "greedy",
    [
        "greedy",
        "sampling",
        "gumbel",
        "schedules",
        "settings",
        "all",
        "quick",
        "deepseek_v4",
    ],
    "What to audit.",
)
common.define_prompts_flag()
flags.DEFINE_integer("prompts_per_domain", 20, "Prompts per domain.", lower_bound=1)
flags.DEFINE_integer("max_new_tokens", 128, "Output budget.", lower_bound=1)
flags.DEFINE_list(
    "drafters",
    ["ngram", "dspark-vanilla", "dspark-gated", "dspark-rnn", "dflash"],
    "Drafters: ngram, dspark-<head> and dflash with random weights, or folders.",
)
flags.DEFINE_list("block_lengths", [str(g) for g in range(1, 9)], "Block lengths.")
flags.DEFINE_list("slots", ["1", "5"], "Batch sizes; larger ones mix temperatures.")
flags.DEFINE_list(
    "schedules", ["fixed"], "Schedules that take turns, see jaxspark generate."
)
flags.DEFINE_bool("full", False, "Every grid cell on every prompt, not on its share.")
flags.DEFINE_integer(
    "most", None, "At most this many prompts per grid cell.", lower_bound=1
)
flags.DEFINE_integer(
    "samples", 200_000, "First tokens of the chi-square test.", lower_bound=2000
)
flags.DEFINE_string("progress", None, "JSON-lines file to keep progress in, resumable.")
flags.DEFINE_string("json_out", None, "File for the figures.")
FLAGS = flags.FLAGS

MAX_PROMPT_TOKENS = 384
# The part of the greedy and gumbel suites that larger ones run, unless flags say else.
PARTS: dict[str, dict] = {
    "all": {
        "drafters": ["ngram", "hybrid:dspark"],
        "block_lengths": ["4"],
        "schedules": ["lagged", "threshold:0.3", "causal", "free"],
        "prompts_per_domain": 4,
        "max_new_tokens": 48,
    },
    "deepseek_v4": {
        "drafters": ["ngram", "deepseek_v4_dspark", "mtp"],
        "block_lengths": ["2", "5"],
        "schedules": ["fixed", "lagged", "causal", "threshold:0.3", "free"],
        # Many requests at once, each with caches of its own.
        "samples": 20_000,
        "prompts_per_domain": 6,
        "max_new_tokens": 48,
    },
}


def audited_drafter(name: str, target):
    """A drafter by name; random weights propose badly, the harder test of exactness.

    Raises:
      ValueError: there is none of that name for the target.
    """
    kind, _, head = name.partition("-")
    options = {"depth": 1, "block_size": 8}
    random = {"dtype": target.model.dtype, "rngs": nnx.Rngs(7)}
    if name == "mtp":
        return MTPDrafter(target.model.config, block_length=5, **random)
    if name == "deepseek_v4_dspark":
        config = draft_configs.deepseek_v4_dspark(target.model.config)
        return DeepSeekV4DSpark(config, **random)
    if kind == "dspark" and head:
        # One head on the full vocabulary, the others on pruned ones.
        vocab = target.model.config.vocab_size
        pruned = {"vanilla": None, "gated": vocab // 6, "rnn": vocab // 12}
        if head not in pruned:
            raise ValueError(f"--drafters={name}: expected dspark-{'|'.join(pruned)}")
        config = draft_configs.dspark(
            target.model.config,
            markov_rank=64,
            markov_head_type=head,
            draft_vocab_size=pruned[head],
            **options,
        )
    elif kind == "dflash":
        config = draft_configs.dflash(target.model.config, **options)
    else:
        return load_drafter(name, target)
    return DSparkDrafter(config, **random)


class Bytes:
    """The tokenizer of models that have none: a text's bytes."""

    def chat(self, messages) -> list[int]:
        """All texts, one after the other."""
        return list("".join(m["content"] for m in messages).encode())

    def decode(self, ids) -> str:
        """The text of bytes, as far as they make one."""
        return bytes(ids).decode(errors="replace")


def random_v4() -> Target:
    """DeepSeek-V4 in small, with random weights and peaked distributions."""
    model = DeepSeekV4(target_configs.deepseek_v4_tiny(256), rngs=nnx.Rngs(0))
    model.embed_tokens.weight[...] *= 30.0
    return Target(model=model, tokenizer=Bytes(), stop_ids=(), name="deepseek_v4_tiny")


def audited_requests(target) -> list[Request]:
    """Greedy requests for the prompts of all domains, one of each in turn."""
    domains = common.load_domains(
        target.tokenizer,
        per_domain=FLAGS.prompts_per_domain,
        max_tokens=MAX_PROMPT_TOKENS,
    )
    return [
        Request(
            prompt=tuple(prompt),
            max_new_tokens=FLAGS.max_new_tokens,
            name=f"{domain}/{i}",
        )
        for i in range(max(map(len, domains.values())))
        for domain, prompts in domains.items()
        for prompt in prompts[i : i + 1]
    ]


def audit_tokens(console: Console, target, requests, suite: str) -> dict:
    """The greedy or gumbel suite over the grid; returns its figures."""
    coupling = "rejection" if suite == "greedy" else "gumbel"
    if suite == "gumbel":
        requests = audit_grid.sampled_requests(requests)
    block_lengths = common.positive("block_lengths")
    grid = list(
        audit_grid.cells(
            FLAGS.drafters,
            block_lengths,
            common.positive("slots"),
            len(requests),
            schedules=[
                name
                for name in FLAGS.schedules
                if coupling in parse_schedule(name).couplings
            ],
            full=FLAGS.full,
            most=FLAGS.most,
        )
    )
    settings = {
        "suite": suite,
        "target": target.name,
        "dtype": FLAGS.dtype,
        "prompts": len(requests),
        "prompts_dir": FLAGS.prompts_dir,
        "max_new_tokens": FLAGS.max_new_tokens,
        "full": FLAGS.full,
        "most": FLAGS.most,
        "drafters": FLAGS.drafters,
        "block_lengths": block_lengths,
        "slots": FLAGS.slots,
        "schedules": FLAGS.schedules,
    }
    finished = CellProgress(FLAGS.progress and f"{FLAGS.progress}.{suite}", settings)
    capacity = round_capacity(
        MAX_PROMPT_TOKENS + FLAGS.max_new_tokens + max(block_lengths)
    )
    with bars(console) as progress:
        bar = progress.add_task("plain decoding", total=len(requests))
        for request in requests:
            if request.name not in finished.plain:
                [tokens] = plain_outputs(
                    target,
                    [request],
                    coupling=coupling,
                    capacity=capacity,
                )
                finished.add({"plain": request.name, "tokens": tokens})
            progress.advance(bar)
        plain = [finished.plain[request.name] for request in requests]
        bar = progress.add_task(suite, total=len(grid))
        for cell in grid:
            progress.update(bar, description=f"{suite}: {cell.name}")
            if cell.name not in finished.cells:
                begin = time.perf_counter()
                result = audit_grid.run_cell(
                    target,
                    audited_drafter(cell.drafter, target),
                    cell,
                    requests,
                    plain,
                    coupling=coupling,
                    capacity=capacity,
                )
                finished.add(_entry(cell, result, time.perf_counter() - begin))
                for difference in result.differences:
                    line = f"{cell.name}: {difference}"
                    if FLAGS.dtype != "float32":
                        line = line.replace("VIOLATION", "difference")
                    progress.console.print(line)
                # Hardly a program serves two cells, and a process may hold but so many.
                jax.clear_caches()
            progress.advance(bar)
    return _summary(console, settings, list(finished.cells.values()))


def _entry(cell, result: AuditResult, seconds: float) -> dict:
    return {
        "cell": cell.name,
        "drafter": cell.drafter,
        "block_length": cell.block_length,
        "slots": cell.slots,
        "schedule": cell.schedule,
        "rounds": result.rounds,
        "seconds": round(seconds, 1),
        **found(result),
    }


def _summary(console, settings, entries) -> dict:
    table = Table(title=f"{settings['suite']} · {settings['target']} · {FLAGS.dtype}")
    for column in ("drafter", "slots", "outputs", "tokens", "accepted length"):
        table.add_column(column, justify="right")
    table.add_column("near-ties", justify="right")
    judged = FLAGS.dtype == "float32"
    table.add_column("violations" if judged else "differences", justify="right")
    groups: dict[tuple, list[dict]] = {}
    for entry in entries:
        groups.setdefault((entry["drafter"], entry["slots"]), []).append(entry)

    for (drafter, slots), group in groups.items():
        tokens, rounds = total(group, "tokens"), total(group, "rounds")
        table.add_row(
            drafter,
            str(slots),
            str(total(group, "outputs")),
            str(tokens),
            f"{tokens / max(rounds, 1):.2f}",
            str(total(group, "near_ties")),
            str(total(group, "violations")),
        )
    console.print(table)
    tokens, ties = total(entries, "tokens"), total(entries, "near_ties")
    figures = {
        **settings,
        "tokens": tokens,
        "near_ties": ties,
        "near_ties_per_10000": 1e4 * ties / max(tokens, 1),
        "violations": total(entries, "violations"),
        "cells": entries,
    }
    if judged:
        console.print(
            f"{tokens} tokens audited: {figures['violations']} violations, "
            f"{ties} near-ties ({figures['near_ties_per_10000']:.2f} in 10,000)"
        )
    else:
        # The guarantees are for float32; coarser rounding is measured, not judged.
        parted = ties + figures.pop("violations")
        figures["parted_per_10000"] = 1e4 * parted / max(tokens, 1)
        console.print(
            f"{FLAGS.dtype}: {parted} outputs part from plain decoding "
            f"({figures['parted_per_10000']:.1f} in 10,000 tokens)"
        )
    return figures


def audit_sampling(console: Console, family: Family) -> dict:
    """Guarantee 2 on tiny models: enumeration, chi-square, acceptance formulas."""
    with bars(console) as progress, compile_workers() as workers:
        checking = [
            workers.submit(rejection.run, FLAGS.samples, [name], family)
            for name in DRAFTERS[family]
        ]
        by_drafter = collect(progress, checking, "sampling")
    checks = [check for each in by_drafter for check in each]
    return checked(console, f"sampling · {family}", checks)


def main() -> int:
    """Runs the suites; 1 if any shows a violation."""
    console = Console()
    chosen, target, family = [FLAGS.suite], None, "dense"
    if FLAGS.suite in PARTS:
        chosen = ["schedules", "sampling", "greedy", "gumbel"]
        for name, value in PARTS[FLAGS.suite].items():
            if FLAGS[name].using_default_value:
                setattr(FLAGS, name, value)
    if FLAGS.suite == "deepseek_v4":
        target, family = random_v4(), "deepseek_v4"
    requests = []
    if {"greedy", "gumbel"}.intersection(chosen):
        # What is wrong with them shows before anything is audited.
        target = target or common.load_text_target()
        requests = audited_requests(target)
        for name in FLAGS.drafters:
            audited_drafter(name, target)
        for name in FLAGS.schedules:
            parse_schedule(name)
    figures = {}
    begin = time.perf_counter()
    for suite in chosen:
        if suite == "sampling":
            figures[suite] = audit_sampling(console, family)
        elif suite == "settings":
            figures[suite] = audit_settings(console)
        elif suite in ("schedules", "quick"):
            figures[suite] = audit_schedules(
                console, quick=suite == "quick", family=family
            )
        else:
            figures[suite] = audit_tokens(console, target, requests, suite)
        jax.clear_caches()
    violations = sum(each.get("violations", 0) for each in figures.values())
    minutes = (time.perf_counter() - begin) / 60
    console.print(f"{FLAGS.suite}: {violations} violations, {minutes:.1f} minutes")
    if FLAGS.json_out:
        common.write_figures(FLAGS.json_out, figures)
    return int(violations > 0)


if __name__ == "__main__":
    program.run(main)
