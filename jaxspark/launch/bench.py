"""Benchmarks: ratios of things run alternately in one process, medians after warm-up.

  jaxspark bench --suite=decode                 plain, n-gram, rows per round
  jaxspark bench --suite=decode --peer_python=.venv-oracle/bin/python
                                                ... beside HF transformers
  jaxspark bench --suite=layout                 how few rows are multiplied
  jaxspark bench --suite=draft --draft=FOLDER   a drafter alone, in hybrid, and n-gram,
                                                at every block length
  jaxspark bench --suite=load --draft=dspark    many requests at once: fixed lengths
                                                against the schedule
  jaxspark bench --suite=overhead               what scheduling itself costs
  jaxspark bench --suite=estimator              forecasts of acceptance: learned while
                                                decoding, calibrated, neither
  jaxspark bench --suite=engine                 the serving engine against
                                                generate_stream
  jaxspark bench --suite=serving                servers under load, over HTTP: with
                                                drafts and without
  jaxspark bench --suite=serving --url=URL      ... or any of OpenAI's protocol
  jaxspark bench --suite=kernels_static         bytes of an attention layer of
                                                DeepSeek-V4, compiled for chips that
                                                need not be here
  jaxspark bench --suite=pages                  caches in pages against whole slots,
                                                and prompts that share a beginning
  jaxspark bench --suite=grammar --draft=ngram  what one output under a grammar costs
                                                those beside it

Compilation is never part of a figure.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
from rich.console import Console

from jaxspark import load_drafter
from jaxspark.benchmark.beside_grammar import bench_beside_grammar
from jaxspark.benchmark.drafts import DraftsOptions, bench_drafts
from jaxspark.benchmark.estimated import EstimatorOptions, bench_estimator
from jaxspark.benchmark.kernels_static import StaticOptions, bench_kernels_static
from jaxspark.benchmark.layout import bench_layout
from jaxspark.benchmark.load import bench_load
from jaxspark.benchmark.one_sequence import SequenceOptions, bench_decode
from jaxspark.benchmark.overhead import OverheadOptions, bench_overhead
from jaxspark.benchmark.pages import bench_pages
from jaxspark.benchmark.serving.options import ServingOptions
from jaxspark.configuration import option
from jaxspark.evaluation.plots import plot_load, plot_serving
from jaxspark.evaluation.prompts import (
    CALIBRATION,
    DOMAINS,
    PromptOptions,
    in_turn,
)
from jaxspark.figures import write_figures
from jaxspark.launch import common, program
from jaxspark.training.data.selection import first_questions


@dataclass(frozen=True, kw_only=True)
class Config(
    common.TargetOptions,
    PromptOptions,
    SequenceOptions,
    DraftsOptions,
    OverheadOptions,
    EstimatorOptions,
    ServingOptions,
    StaticOptions,
):
    """What to measure."""

    suite: str = option(
        "What to measure.",
        "decode",
        choices=(
            "decode",
            "layout",
            "draft",
            "load",
            "overhead",
            "estimator",
            "pages",
            "engine",
            "grammar",
            "serving",
            "kernels_static",
        ),  # fmt: skip
    )
    draft: str = option(
        "Drafter of --suite=draft, load, overhead, estimator, engine and grammar.",
        "dspark",
    )
    prompts_per_domain: int = option("Prompts per domain.", 3, at_least=1)
    progress: str | None = option(
        "JSON-lines file that a stopped --suite=load or serving goes on from.", None
    )
    json_out: str | None = common.json_option()

    def keep(self, figures: dict) -> None:
        """Writes what there is so far, where figures are wanted."""
        if self.json_out:
            write_figures(self.json_out, {"figures": figures})

    def plot(self, plot: Callable[[str, dict], None], figures: dict) -> None:
        """Draws figures beside their file."""
        if self.json_out:
            plot(self.json_out.removesuffix(".json") + ".png", figures)


def measured(console: Console, config: Config) -> dict:
    """The figures of a suite."""
    if config.suite == "layout":
        return bench_layout(console, config.rows, config.repeats)
    if config.suite == "kernels_static":
        return {"layers": bench_kernels_static(console, config)}
    target, tokenizer = config.load()
    if config.suite == "serving":
        return _serving(console, tokenizer, config)
    if config.suite == "decode":
        return bench_decode(console, target, config)
    if config.suite == "pages":
        return bench_pages(console, target, config.repeats)
    drafting = config.suite == "draft"
    domains = config.read_prompts(
        tokenizer,
        per_domain=config.prompts_per_domain,
        max_tokens=384 if drafting else config.capacity // 2,
    )
    if drafting:
        return bench_drafts(console, target, config.draft, domains, config)
    if config.suite == "estimator":
        fit_domains = {
            domain: first_questions(
                tokenizer,
                (path,),
                most=config.prompts_per_domain,
                max_tokens=config.capacity // 2,
            )
            for domain, path in zip(DOMAINS, CALIBRATION)
        }
        drafter = load_drafter(config.draft, target)
        return bench_estimator(console, target, drafter, fit_domains, domains, config)
    prompts = in_turn(domains)
    if config.suite == "overhead":
        drafter = load_drafter(config.draft, target)
        return bench_overhead(console, target, drafter, prompts, config)
    if config.suite == "engine":
        with needing_servers():
            from jaxspark.benchmark.engine import bench_engine
        drafter = load_drafter(config.draft, target)
        return bench_engine(console, target, drafter, prompts, config)
    if config.suite == "grammar":
        drafter = load_drafter(config.draft, target)
        return bench_beside_grammar(console, target, drafter, prompts, config.repeats)
    names = ("draft", "target", "dtype", "repeats", "capacity", "fixed_lengths",
             "prompts_dir", "prompts_per_domain", "load_prompts", "load_block",
             "load_rounds", "load_temperature")  # fmt: skip

    figures = bench_load(
        console,
        target,
        config.draft,
        prompts,
        config,
        progress_file=config.progress,
        settings=config.recorded(names),
        on_figures=config.keep,
    )
    config.plot(plot_load, figures)
    return figures


@contextlib.contextmanager
def needing_servers() -> Iterator[None]:
    """Within it what a server needs is imported; says what is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(
            f"this suite needs more packages: pip install 'jaxspark[serve]' ({error})"
        ) from error


def _serving(console: Console, tokenizer, config: Config) -> dict:
    """The figures of --suite=serving."""
    with needing_servers():
        from jaxspark.benchmark.serving.suite import bench_serving
    names = ("target", "dtype", "prompts_dir", "url", "url_model", "servers",
             "serving_slots", "serving_requests", "repeats", "capacity", "length_scale",
             "load_temperature", "long_prompt", "long_seconds")  # fmt: skip

    figures = bench_serving(
        console,
        tokenizer,
        config,
        flags=(f"--target={config.target}", f"--dtype={config.dtype}"),
        prompts_dir=config.prompts_dir,
        progress_file=config.progress,
        settings=config.recorded(names),
        on_figures=config.keep,
    )
    config.plot(plot_serving, figures)
    return figures


def main(config: Config) -> None:
    """Runs the suite and prints its tables."""
    figures = {
        "suite": config.suite,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "dtype": config.dtype,
        "figures": measured(common.console(), config),
    }
    if config.json_out:
        write_figures(config.json_out, figures)


if __name__ == "__main__":
    program.run(main, Config)
