"""`jaxspark audit --suite=sampling`: guarantee 2 on tiny models."""

from rich.console import Console

from jaxspark.exactness import rejection
from jaxspark.exactness.suites.report import checked
from jaxspark.exactness.tiny_models import DRAFTERS, Family
from jaxspark.exactness.workers import collect, compile_workers
from jaxspark.progress import bars


def audit_sampling(console: Console, *, samples: int, family: Family) -> dict:
    """Enumeration, chi-square and acceptance formulas of every drafter; the figures."""
    with bars(console) as progress, compile_workers() as workers:
        checking = [
            workers.submit(rejection.run, samples, [name], family)
            for name in DRAFTERS[family]
        ]
        by_drafter = collect(progress, checking, "sampling")
    checks = [check for each in by_drafter for check in each]
    return checked(console, f"sampling · {family}", checks)
