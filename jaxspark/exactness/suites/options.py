"""Suites of `jaxspark audit` by name, and what can be chosen of them."""

from dataclasses import dataclass, fields, replace

from jaxspark.configuration import Configuration, option
from jaxspark.exactness.suites.tokens import TokenGrid
from jaxspark.exactness.tiny_models import Family

SUITES = (
    *("greedy", "sampling", "gumbel", "schedules", "parameters", "settings", "mesh"),
    *("prefix", "grammar", "all", "quick", "deepseek_v4"),
)
# What these run of the greedy and gumbel suites, unless options say else.
GRIDS = {
    "all": TokenGrid(
        drafters=("ngram", "hybrid:dspark"),
        block_lengths=(4,),
        schedules=("lagged", "threshold:0.3", "causal"),
        prompts_per_domain=4,
        max_new_tokens=48,
    ),
    "deepseek_v4": TokenGrid(
        drafters=("ngram", "deepseek_v4_dspark", "mtp"),
        block_lengths=(2, 5),
        schedules=("fixed", "lagged", "causal", "threshold:0.3", "free"),
        prompts_per_domain=6,
        max_new_tokens=48,
    ),
}


def _of_suite(name: str) -> str:
    """A default that depends on the suite, in words."""

    def shown(grid: TokenGrid) -> str:
        value = getattr(grid, name)
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    others = "; ".join(f"{suite}: {shown(grid)}" for suite, grid in GRIDS.items())
    return f"By default {shown(TokenGrid())} ({others})."


@dataclass(frozen=True, kw_only=True)
class AuditOptions(Configuration):
    """What of a suite is tried; by default what its grid says."""

    suite: str = option("What to audit.", "greedy", choices=SUITES)
    prompts_per_domain: int | None = option(
        f"Prompts per domain. {_of_suite('prompts_per_domain')}", None, at_least=1
    )
    max_new_tokens: int | None = option(
        f"Output budget. {_of_suite('max_new_tokens')}", None, at_least=1
    )
    drafters: tuple[str, ...] | None = option(
        "Drafters: ngram, dspark-<head> and dflash with random weights, or folders. "
        f"{_of_suite('drafters')}",
        None,
    )
    block_lengths: tuple[int, ...] | None = option(
        f"Block lengths. {_of_suite('block_lengths')}", None, at_least=1
    )
    slots: tuple[int, ...] = option(
        "Batch sizes; larger ones mix temperatures.", TokenGrid.slots, at_least=1
    )
    schedules: tuple[str, ...] | None = option(
        f"Schedules that take turns, see jaxspark generate. {_of_suite('schedules')}",
        None,
    )
    full: bool = option("Every grid cell on every prompt, not on its share.", False)
    max_prompts: int | None = option(
        "At most this many prompts per grid cell.", None, at_least=1, formerly="most"
    )
    samples: int | None = option(
        "First tokens of the chi-square test. By default 200000 (deepseek_v4: 20000).",
        None,
        at_least=2000,
    )
    grammars: int = option("Random grammars of the grammar suite.", 500, at_least=1)
    progress: str | None = option(
        "JSON-lines file to keep progress in, resumable.", None
    )

    def grid(self) -> TokenGrid:
        """That of the suite, with what the options change."""
        given = {each.name: getattr(self, each.name) for each in fields(TokenGrid)}
        chosen = {name: value for name, value in given.items() if value is not None}
        return replace(GRIDS.get(self.suite, TokenGrid()), **chosen)

    @property
    def suites(self) -> tuple[str, ...]:
        """The suites that are run."""
        several = ("schedules", "parameters", "sampling", "greedy", "gumbel")
        return several if self.suite in GRIDS else (self.suite,)

    @property
    def family(self) -> Family:
        """The tiny models that are audited."""
        return "deepseek_v4" if self.suite == "deepseek_v4" else "dense"

    @property
    def many_samples(self) -> int:
        """Samples of the chi-square tests."""
        # DeepSeek-V4 has many requests at once, each with caches of its own.
        return self.samples or (20_000 if self.family == "deepseek_v4" else 200_000)
