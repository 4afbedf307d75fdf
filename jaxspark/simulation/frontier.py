"""Frontiers: throughput of all users against the speed of one, policy by policy."""

from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from jaxspark.calibration.profile import load_profiles
from jaxspark.decoding import Costs, Fixed, Lagged, Scheduler
from jaxspark.decoding.costs import draft_ladder
from jaxspark.decoding.couplings import Coupling
from jaxspark.progress import bars
from jaxspark.simulation.simulate import Load, Simulated, Trace, simulate, speed_at

# Given a number of users: recorded drafts, the schedule and the costs of rounds.
Policy = Callable[[int], tuple[Trace, Scheduler, Costs]]


def frontiers(
    console: Console,
    title: str,
    policies: Mapping[str, Policy],
    users: Sequence[int],
    *,
    rounds: int,
    rate: float | None,
) -> dict[str, dict[str, Simulated]]:
    """For every policy, what each number of users sees.

    Args:
      console: where a bar is shown.
      title: of the bar.
      policies: by name.
      users: requests decoded together.
      rounds: of 100 users or more; fewer users play as many all together.
      rate: requests per second; None for a closed loop.
    """
    found: dict[str, dict[str, Simulated]] = {}
    with bars(console, transient=True) as progress:
        task = progress.add_task(title, total=len(policies) * len(users))
        for name, policy in policies.items():
            found[name] = {}
            for slots in users:
                trace, schedule, costs = policy(slots)
                # A single user sees many requests, one after the other.
                played = max(rounds, 100 * rounds // slots)
                load = Load(slots=slots, rate=rate)
                point = simulate(trace, schedule, costs, load, rounds=played)
                found[name][str(slots)] = point
                progress.advance(task)
    return found


def measured_policies(
    trace: Trace, path: str, coupling: Coupling
) -> tuple[dict[str, Policy], list[int]]:
    """A trace against measured costs; users are those costs were measured for.

    Args:
      trace: recorded rounds.
      path: costs of jaxspark profile_cost.
      coupling: that the rounds were recorded under.

    Raises:
      ValueError: costs of other blocks or another coupling than the trace's, or twice
        of as many slots.
    """
    length = trace.survival_NG.shape[1]
    costs: dict[int, Costs] = {}
    for profile in load_profiles(path):
        made = profile.setting
        if made.block_length != length:
            raise ValueError(
                f"{path}: costs of blocks of {made.block_length}, "
                f"the trace has blocks of {length}"
            )
        if made.coupling != coupling:
            raise ValueError(
                f"{path}: costs under coupling {made.coupling!r}, the trace's "
                f"is {coupling!r} (--coupling)"
            )
        if made.slots in costs:
            raise ValueError(
                f"{path}: has several costs of {made.slots} slots; keep one"
            )
        costs[made.slots] = profile.costs

    def fixed(k: int) -> Policy:
        return lambda n: (trace, Fixed(k), costs[n])

    policies = {"no speculation": fixed(0)}
    policies |= {f"fixed {k}": fixed(k) for k in draft_ladder(length)[1:]}
    policies["scheduled"] = lambda n: (trace, Lagged(costs=costs[n]), costs[n])
    return policies, sorted(costs)


def gains(found: dict, over: str, of: str) -> dict[str, float]:
    """How much faster one user is at the throughput another policy reaches."""
    frontier = list(found[of].values())
    result = {}
    for users, point in found[over].items():
        speed = speed_at(point.throughput, frontier)
        if speed is not None:
            result[users] = speed / point.user_speed - 1
    return result


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
