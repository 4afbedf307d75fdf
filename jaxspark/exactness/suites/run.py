"""Suites of `jaxspark audit`, one after the other."""

from collections.abc import Sequence

import jax
from rich.console import Console

from jaxspark.checkpoints import Target
from jaxspark.exactness.suites.grammars import audit_random_grammars
from jaxspark.exactness.suites.meshes import audit_meshes
from jaxspark.exactness.suites.options import AuditOptions
from jaxspark.exactness.suites.prefix import audit_prefix
from jaxspark.exactness.suites.sampling import audit_sampling
from jaxspark.exactness.suites.schedules import FEW, HALF, QUICK, audit_schedules
from jaxspark.exactness.suites.settings import audit_settings
from jaxspark.exactness.suites.tokens import audit_tokens
from jaxspark.generation import Request


def run_suites(
    console: Console,
    options: AuditOptions,
    target: Target | None,
    requests: Sequence[Request],
    *,
    prompts_dir: str | None,
) -> dict[str, dict]:
    """The figures of every suite that was chosen.

    Args:
      console: where tables, bars and differences are printed.
      options: which suites, and what of them.
      target: of suites on real prompts; None where there is no such suite.
      requests: greedy ones, for the same.
      prompts_dir: where their prompts are from.
    """
    figures = {}
    for suite in options.suites:
        if suite == "sampling":
            found = audit_sampling(
                console, samples=options.many_samples, family=options.family
            )
        elif suite == "settings":
            found = audit_settings(console)
        elif suite == "mesh":
            found = audit_meshes(console, progress_file=options.progress)
        elif suite == "prefix":
            found = audit_prefix(console, progress_file=options.progress)
        elif suite == "grammar":
            assert target is not None
            found = audit_random_grammars(
                console,
                target,
                count=options.grammars,
                max_new_tokens=options.max_new_tokens or 48,
                samples=options.many_samples,
                family=options.family,
            )
        elif suite in ("schedules", "parameters", "quick"):
            adjusted = suite == "parameters"
            every = {"quick": QUICK, "all": HALF}.get(options.suite, 1)
            if adjusted and options.suite != suite:
                every = FEW
            found = audit_schedules(
                console,
                every=every,
                adjusted=adjusted,
                family=options.family,
                samples=options.many_samples,
                progress_file=options.progress,
            )
        else:
            assert target is not None
            found = audit_tokens(
                console,
                target,
                requests,
                suite,
                options.grid(),
                progress_file=options.progress,
                prompts_dir=prompts_dir,
            )
        figures[suite] = found
        jax.clear_caches()
    return figures
