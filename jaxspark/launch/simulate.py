r"""Simulates serving: throughput of all users against the speed of one.

  jaxspark simulate --json_out=results/simulated_v4_flash.json
  jaxspark simulate --trace=runs/calibration/test_rejection_1.npz \
      --costs=costs.json --draft=dspark

What drafts are worth is stated (--acceptance), or was recorded by jaxspark calibrate
(--trace). What rounds cost was measured by jaxspark profile_cost (--costs, for a
trace), or follows from a roofline of DeepSeek-V4-Flash on 8 GPUs and on a TPU slice;
every assumption is printed and kept in the file. Nothing it prints was measured.
"""

from dataclasses import asdict, dataclass
from typing import Any

from jaxspark.calibration.rounds import Rounds
from jaxspark.calibration.schedules import find_calibration
from jaxspark.configuration import option
from jaxspark.decoding.couplings import COUPLINGS, Coupling
from jaxspark.evaluation.plots import plot_frontier
from jaxspark.figures import write_figures
from jaxspark.launch import common, program
from jaxspark.simulation.frontier import (
    Policy,
    frontiers,
    gains,
    measured_policies,
    report,
)
from jaxspark.simulation.simulate import Trace
from jaxspark.simulation.v4_flash import (
    MACHINES,
    NETWORKS,
    StatedOptions,
    assumptions,
    roofline_policies,
    stated_trace,
)


@dataclass(frozen=True, kw_only=True)
class Config(StatedOptions):
    """Who asks, what drafts are worth, what rounds cost."""

    users: tuple[int, ...] = option(
        "Requests decoded together (closed loop).",
        tuple(2**n for n in range(11)),
        at_least=1,
    )
    rate: float | None = option(
        "Requests per second that arrive by chance and queue for a slot; by default "
        "every slot is always taken.",
        None,
        at_least=1e-3,
    )
    rounds: int = option(
        "Rounds of 100 users or more; fewer users play as many rounds all together.",
        400,
        at_least=20,
    )
    trace: str | None = option("Rounds recorded by jaxspark calibrate.", None)
    costs: str | None = option(
        "Costs for --trace, of jaxspark profile_cost; else the roofline's.", None
    )
    draft: str | None = option("Calibrate --trace as this drafter's confidences.", None)
    temperature: float = option(
        "Sampling temperature of the trace, for its calibration.", 1.0, at_least=0
    )
    coupling: Coupling = option(
        "Coupling of the trace, for its calibration and costs.",
        "rejection",
        choices=COUPLINGS,
    )
    json_out: str | None = option("File for the figures; a PNG goes beside it.", None)

    def __post_init__(self):
        super().__post_init__()
        if not self.trace and (self.costs or self.draft):
            raise ValueError(
                "--costs and --draft are for a --trace of jaxspark calibrate"
            )
        if self.trace and self.acceptance:
            raise ValueError("a --trace has its own acceptance; leave --acceptance out")

    def drafts(self) -> Trace:
        """What drafts are worth: stated, or recorded and calibrated."""
        if self.trace is None:
            return stated_trace(self)
        rounds = Rounds.load(self.trace)
        calibration = None
        if self.draft:
            calibration = find_calibration(self.draft, self.coupling)
        return Trace.recorded(rounds, calibration, self.temperature)


def main(config: Config) -> None:
    """Simulates, prints, writes."""
    console = common.console()
    figures: dict[str, Any] = {"simulated": True}
    block = config.drafts()
    settings: dict[str, dict[str, Policy]] = {}
    if config.trace and config.costs:
        policies, users = measured_policies(block, config.costs, config.coupling)
        settings[config.trace] = policies
    else:
        users = sorted(set(config.users))
        settings |= {m.name: roofline_policies(m, block, config) for m in MACHINES}
        figures["assumptions"] = assumptions(
            config, trace=config.trace, rate=config.rate, rounds=config.rounds
        )
        figures["machines"] = {m.name: asdict(m) for m in MACHINES}
        figures["networks"] = {n.name: asdict(n) for n in NETWORKS}
        for line in figures["assumptions"]:
            console.print(f"- {line}", highlight=False)
    curves = {}
    for title, policies in settings.items():
        found = frontiers(
            console, title, policies, users, rounds=config.rounds, rate=config.rate
        )
        report(console, title, found)
        curves[title] = found
        figures[title] = {
            name: {users: asdict(each) for users, each in points.items()}
            for name, points in found.items()
        }
        if "MTP-1" in found:
            gain = gains(found, "MTP-1", list(found)[-1])
            figures[title]["speed_gain_over_mtp_1_at_its_throughput"] = gain
            line = ", ".join(f"{100 * g:+.0f} % ({u} users)" for u, g in gain.items())
            console.print(f"{title}, simulated: speed of a user against MTP-1: {line}")
    if config.json_out:
        write_figures(config.json_out, figures)
        plot_frontier(config.json_out.removesuffix(".json") + ".png", curves)


if __name__ == "__main__":
    program.run(main, Config)
