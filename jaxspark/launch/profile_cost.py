"""Measures what a round costs on this machine, for cost-aware schedules.

  jaxspark profile_cost --draft=hybrid:dspark --slots=1,8,64 --out=costs.json

Times whole rounds of every draft length, with every token bucket, in turn. The file
says what it was made for; commands refuse it on another device, with other models,
another number of slots, or for greedy requests if --temperature is not 0.
"""

from absl import flags
from rich.console import Console
from rich.table import Table

from jaxspark import load_drafter
from jaxspark.calibration.profile import (
    CostProfile,
    measured_with_progress,
    save_profiles,
)
from jaxspark.launch import common, program

common.define_model_flags(draft="dspark")
flags.DEFINE_list("slots", ["1", "8", "64"], "Numbers of requests decoded together.")
flags.DEFINE_integer(
    "capacity", 512, "Cache positions of each request.", lower_bound=16
)
flags.DEFINE_float("temperature", 1.0, "0 is greedy, which spares sampling.")
common.define_coupling_flag()
flags.DEFINE_integer("repeats", 5, "Timed runs of each bucket.", lower_bound=1)
flags.DEFINE_string("out", None, "JSON file.")
flags.mark_flags_as_required(["out"])
FLAGS = flags.FLAGS


def report(console: Console, profile: CostProfile) -> None:
    """The table of one number of slots."""
    setting, costs = profile.setting, profile.costs
    table = Table(
        title=f"{setting.slots} slots · {setting.block_length} drafts · "
        f"{setting.capacity} positions · {setting.device}"
    )
    table.add_column("drafts", justify="right")
    table.add_column("tokens", justify="right")
    table.add_column("ms", justify="right")
    table.add_column("against plain", justify="right")
    plain = costs.drafting(0).seconds[0]
    for curve in costs.curves:
        for size, seconds in zip(curve.sizes, curve.seconds):
            ratio = f"{seconds / plain:.2f}x"
            table.add_row(
                str(curve.draft_length), str(size), f"{1e3 * seconds:.1f}", ratio
            )
    console.print(table)


def main() -> None:
    """Measures every number of slots and writes the file."""
    console = Console()
    target = common.load_text_target()
    drafter = load_drafter(FLAGS.draft, target)
    profiles = []
    for slots in common.positive("slots"):
        profile = measured_with_progress(
            target,
            drafter,
            console=console,
            slots=slots,
            block_length=FLAGS.block_length,
            capacity=FLAGS.capacity,
            coupling=FLAGS.coupling,
            temperature=FLAGS.temperature,
            repeats=FLAGS.repeats,
        )
        profiles.append(profile)
        report(console, profiles[-1])
        save_profiles(FLAGS.out, profiles)


if __name__ == "__main__":
    program.run(main)
