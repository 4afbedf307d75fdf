"""Audits exactness: speculation must not change a token, nor a distribution.

  jaxspark audit --suite=greedy         guarantee 1, on real prompts
  jaxspark audit --suite=sampling       guarantee 2, enumeration and chi-square
  jaxspark audit --suite=gumbel         guarantee 3, on real prompts
  jaxspark audit --suite=schedules      all three, tiny models: every drafter, schedule,
                                        coupling, bucket set and batch
  jaxspark audit --suite=parameters     the same for requests with penalties, biases,
                                        bans and least lengths, and their
                                        log-probabilities; plain decoding by definition
  jaxspark audit --suite=grammar        outputs under grammars: the law of rounds, and
                                        random schemas and expressions under a real
                                        model's tokens, which what ends must obey
  jaxspark audit --suite=all            half of schedules, sampling, and parts of
                                        parameters, and of greedy and gumbel with
                                        schedules
  jaxspark audit --suite=quick          a share of schedules, two minutes
  jaxspark audit --suite=settings       that share under every global JAX setting a
                                        program may have chosen
  jaxspark audit --suite=mesh           the tokens of one device on meshes of eight
                                        (virtual ones on a CPU)
  jaxspark audit --suite=prefix         guarantee 4: cold starts against cache hits,
                                        and random sequences of requests
  jaxspark audit --suite=deepseek_v4    everything for DeepSeek-V4 and its drafters,
                                        random weights

Prints violations and near-ties (the two best choices within 1e-4 in float32, where
rounding decides); exits 1 if there is a violation. In bfloat16 the rate of differences
is printed and none is a violation. Long audits keep their progress in
--progress and go on from there.
"""

import time
from dataclasses import dataclass

from jaxspark.evaluation.prompts import PromptOptions
from jaxspark.exactness.audit_models import audited_requests, random_v4
from jaxspark.exactness.suites.options import AuditOptions
from jaxspark.exactness.suites.run import run_suites
from jaxspark.exactness.suites.tokens import MAX_PROMPT_TOKENS
from jaxspark.figures import write_figures
from jaxspark.launch import common, program


@dataclass(frozen=True, kw_only=True)
class Config(common.TargetOptions, PromptOptions, AuditOptions):
    """What to audit."""

    json_out: str | None = common.json_option()


def main(config: Config) -> int:
    """Runs the suites; 1 if any shows a violation."""
    console = common.console()
    grid, target, requests = config.grid(), None, []
    if {"greedy", "gumbel"}.intersection(config.suites):
        # What is wrong with them shows before anything is audited.
        target = random_v4() if config.family == "deepseek_v4" else config.load()[0]
        prompts = config.read_prompts(
            target.tokenizer,
            per_domain=grid.prompts_per_domain,
            max_tokens=MAX_PROMPT_TOKENS,
        )
        requests = audited_requests(prompts, grid.max_new_tokens)
        grid.check(target)
    elif "grammar" in config.suites:
        target, _ = config.load()
    begin = time.perf_counter()
    prompts_dir = config.prompts_dir
    figures = run_suites(console, config, target, requests, prompts_dir=prompts_dir)
    violations = sum(each.get("violations", 0) for each in figures.values())
    minutes = (time.perf_counter() - begin) / 60
    console.print(f"{config.suite}: {violations} violations, {minutes:.1f} minutes")
    if config.json_out:
        write_figures(config.json_out, figures)
    return int(violations > 0)


if __name__ == "__main__":
    program.run(main, Config)
