"""Measures what a round costs on this machine, for cost-aware schedules.

  jaxspark profile_cost --draft=hybrid:dspark --slots=1,8,64 --out=costs.json

Times whole rounds of every draft length, with every token bucket, in turn. The file
says what it was made for; commands refuse it on another device, with other models,
another number of slots, or for greedy requests if --temperature is not 0.
"""

from dataclasses import dataclass

from jaxspark import load_drafter
from jaxspark.calibration.measuring import measured_with_progress
from jaxspark.calibration.profile import save_profiles
from jaxspark.calibration.report import report_costs
from jaxspark.configuration import option
from jaxspark.launch import common, program


@dataclass(frozen=True, kw_only=True)
class Config(common.TargetOptions, common.DraftOptions, common.CouplingOptions):
    """Whose rounds to time."""

    draft: str = common.draft_option("dspark")
    slots: tuple[int, ...] = option(
        "Numbers of requests decoded together.", (1, 8, 64), at_least=1
    )
    capacity: int = option("Cache positions of each request.", 512, at_least=16)
    temperature: float = option(
        "Sampling temperature; 0 is greedy, which spares sampling.", 1.0, at_least=0
    )
    repeats: int = option("Timed runs of each bucket.", 5, at_least=1)
    out: str = option("JSON file.")


def main(config: Config) -> None:
    """Measures every number of slots and writes the file."""
    console = common.console()
    target, _ = config.load()
    drafter = load_drafter(config.draft, target)
    profiles = []
    for slots in config.slots:
        profile = measured_with_progress(
            target,
            drafter,
            console=console,
            slots=slots,
            block_length=config.block_length,
            capacity=config.capacity,
            coupling=config.coupling,
            temperature=config.temperature,
            repeats=config.repeats,
        )
        profiles.append(profile)
        report_costs(console, profiles[-1])
        save_profiles(config.out, profiles)


if __name__ == "__main__":
    program.run(main, Config)
