r"""Simulates serving: throughput of all users against the speed of one.

  jaxspark simulate --json_out=results/simulated_v4_flash.json
  jaxspark simulate --trace=runs/calibration/test_rejection_1.npz \
      --costs=costs.json --draft=dspark

What drafts are worth is stated (--acceptance), or was recorded by jaxspark calibrate
(--trace). What rounds cost was measured by jaxspark profile_cost (--costs, for a
trace), or follows from a roofline of DeepSeek-V4-Flash on 8 GPUs and on a TPU slice;
every assumption is printed and kept in the file. Nothing it prints was measured.
"""

from dataclasses import asdict

from absl import flags
from rich.console import Console
from rich.table import Table

from jaxspark.calibration.profile import load_profiles
from jaxspark.calibration.rounds import Rounds
from jaxspark.decoding import Costs, Fixed, Lagged
from jaxspark.decoding.costs import draft_ladder
from jaxspark.evaluation.plots import plot_frontier
from jaxspark.launch import common, program
from jaxspark.launch.progress import bars
from jaxspark.launch.simulate_v4 import (
    MACHINES,
    NETWORKS,
    assumptions,
    roofline_policies,
    stated_trace,
)
from jaxspark.simulation.simulate import Load, Simulated, Trace, simulate, speed_at

flags.DEFINE_list(
    "users", [str(2**n) for n in range(11)], "Requests decoded together (closed loop)."
)
flags.DEFINE_float(
    "rate",
    None,
    "Requests per second that arrive by chance and queue for a slot; by default every "
    "slot is always taken.",
    lower_bound=1e-3,
)
flags.DEFINE_integer(
    "rounds",
    400,
    "Rounds of 100 users or more; fewer users play as many rounds all together.",
    lower_bound=20,
)
flags.DEFINE_string("trace", None, "Rounds recorded by jaxspark calibrate.")
flags.DEFINE_string(
    "costs", None, "Costs for --trace, of jaxspark profile_cost; else the roofline's."
)
flags.DEFINE_string("draft", None, "Calibrate --trace as this drafter's confidences.")
flags.DEFINE_float("temperature", 1.0, "The trace's, for its calibration.")
common.define_coupling_flag("The trace's, for the same.")
flags.DEFINE_string("json_out", None, "File for the figures; a PNG goes beside it.")
FLAGS = flags.FLAGS


def frontiers(
    console: Console, title: str, policies: dict, users: list[int]
) -> dict[str, dict[str, Simulated]]:
    """For every policy, what each number of users sees.

    `policies` maps a name to a function of the number of users that gives trace,
    schedule and costs.
    """
    found: dict[str, dict[str, Simulated]] = {}
    with bars(console, transient=True) as progress:
        task = progress.add_task(title, total=len(policies) * len(users))
        for name, policy in policies.items():
            found[name] = {}
            for slots in users:
                trace, schedule, costs = policy(slots)
                # A single user sees many requests, one after the other.
                rounds = max(FLAGS.rounds, 100 * FLAGS.rounds // slots)
                load = Load(slots=slots, rate=FLAGS.rate)
                point = simulate(trace, schedule, costs, load, rounds=rounds)
                found[name][str(slots)] = point
                progress.advance(task)
    return found


def recorded() -> Trace:
    """The rounds of --trace, calibrated as --draft says."""
    rounds = Rounds.load(FLAGS.trace)
    calibration = common.find_calibration() if FLAGS.draft else None
    return Trace.recorded(rounds, calibration, FLAGS.temperature)


def measured_policies(trace: Trace) -> tuple[dict, list[int]]:
    """A trace against measured costs; users are those costs were measured for.

    Raises:
      ValueError: costs of other blocks or another coupling than the trace's, or twice
        of as many slots.
    """
    length = trace.survival_NG.shape[1]
    costs: dict[int, Costs] = {}
    for profile in load_profiles(FLAGS.costs):
        made = profile.setting
        if made.block_length != length:
            raise ValueError(
                f"{FLAGS.costs}: costs of blocks of {made.block_length}, "
                f"the trace has blocks of {length}"
            )
        if made.coupling != FLAGS.coupling:
            raise ValueError(
                f"{FLAGS.costs}: costs under coupling {made.coupling!r}, the trace's "
                f"is {FLAGS.coupling!r} (--coupling)"
            )
        if made.slots in costs:
            raise ValueError(
                f"{FLAGS.costs}: has several costs of {made.slots} slots; keep one"
            )
        costs[made.slots] = profile.costs

    policies = {
        "no speculation": lambda n: (trace, Fixed(0), costs[n]),
        **{
            f"fixed {k}": lambda n, k=k: (trace, Fixed(k), costs[n])
            for k in draft_ladder(length)[1:]
        },
        "scheduled": lambda n: (trace, Lagged(costs=costs[n]), costs[n]),
    }
    return policies, sorted(costs)


def report(console: Console, title: str, found: dict) -> None:
    """Tokens per second of all users, and of one."""
    table = Table(title=f"{title} · simulated · tokens/s of all (of one)")
    table.add_column("users", justify="right")
    for name in found:
        table.add_column(name, justify="right")
    for users in next(iter(found.values())):
        cells = (each[users] for each in found.values())
        table.add_row(
            users, *(f"{c.throughput:,.0f} ({c.user_speed:.0f})" for c in cells)
        )
    scheduled = list(found.values())[-1]
    table.add_section()
    verified = [f"{each.verified_length:.1f}" for each in scheduled.values()]
    console.print(table)
    console.print(f"verified per request, scheduled: {' '.join(verified)}")


def gains(found: dict, over: str, of: str) -> dict[str, float]:
    """How much faster one user is at the throughput another policy reaches."""
    frontier = list(found[of].values())
    result = {}
    for users, point in found[over].items():
        speed = speed_at(point.throughput, frontier)
        if speed is not None:
            result[users] = speed / point.user_speed - 1
    return result


def main() -> None:
    """Simulates, prints, writes."""
    console = Console()
    figures: dict[str, dict] = {"simulated": True}
    if not FLAGS.trace and (FLAGS.costs or FLAGS.draft):
        raise ValueError("--costs and --draft are for a --trace of jaxspark calibrate")
    if FLAGS.trace and FLAGS.acceptance:
        raise ValueError("a --trace has its own acceptance; leave --acceptance out")
    if FLAGS.trace:
        block = recorded()
    else:
        block = stated_trace()
    if FLAGS.costs:
        policies, users = measured_policies(block)
        settings = {FLAGS.trace: policies}
    else:
        users = sorted(set(common.positive("users")))
        settings = {m.name: roofline_policies(m, block) for m in MACHINES}
        figures["assumptions"] = assumptions()
        figures["machines"] = {m.name: asdict(m) for m in MACHINES}
        figures["networks"] = {n.name: asdict(n) for n in NETWORKS}
        for line in figures["assumptions"]:
            console.print(f"- {line}", highlight=False)
    curves = {}
    for title, policies in settings.items():
        found = frontiers(console, title, policies, users)
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
    if FLAGS.json_out:
        common.write_figures(FLAGS.json_out, figures)
        plot_frontier(FLAGS.json_out.removesuffix(".json") + ".png", curves)


if __name__ == "__main__":
    program.run(main)
