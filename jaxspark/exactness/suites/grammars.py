"""`jaxspark audit --suite=grammar`: outputs under grammars.

The law of rounds on tiny models, every drafter; then random schemas and expressions
under a real model's tokens, greedy and sampled, against plain decoding. Whatever ended
by itself must obey, which is decided without the library that made the masks.
"""

from rich.console import Console

from jaxspark.drafters import NgramDrafter
from jaxspark.exactness import grammars
from jaxspark.exactness.suites.report import checked, found
from jaxspark.exactness.suites.schedules import few_optimizations
from jaxspark.exactness.tiny_models import Family
from jaxspark.target import Target

SLOTS = 16


def audit_random_grammars(
    console: Console,
    target: Target,
    *,
    count: int,
    max_new_tokens: int,
    samples: int,
    family: Family,
) -> dict:
    """All of it; its figures.

    Args:
      console: where tables and differences are printed.
      target: a loaded one, with a tokenizer.
      count: random grammars.
      max_new_tokens: of each output.
      samples: of the chi-square tests.
      family: of the tiny models.
    """
    # Compiling takes most of the time of tiny models.
    with few_optimizations():
        checks = grammars.enumeration_checks(family=family)
        checks += grammars.frequency_checks(samples // 10, family=family)
    figures = checked(console, f"rounds under grammars · {family}", checks)
    requests = grammars.random_requests(
        target, count, seed=0, max_new_tokens=max_new_tokens
    )
    seen = grammars.audit_grammars(
        target, NgramDrafter(block_length=4), requests, slots=SLOTS
    )
    for line in (*map(str, seen.audit.differences), *seen.disobeyed, *seen.failed):
        console.print(line, markup=False)
    console.print(
        f"{count} random grammars, {seen.audit.tokens} tokens in {seen.audit.rounds} "
        f"rounds: {seen.ended} outputs ended by themselves, {len(seen.disobeyed)} of "
        f"them do not obey; {len(seen.failed)} failed; "
        f"{len(seen.audit.violations)} violations, "
        f"{len(seen.audit.near_ties)} near-ties"
    )
    wrong = len(seen.audit.violations) + len(seen.disobeyed) + len(seen.failed)
    entry = found(seen.audit) | {
        "grammars": count,
        "ended": seen.ended,
        "disobeyed": seen.disobeyed,
        "failed": seen.failed,
    }
    return {
        "violations": figures["violations"] + wrong,
        "checks": figures["checks"],
        "random": entry,
    }
