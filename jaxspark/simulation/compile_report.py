"""Tables of what a compiled program needs."""

from typing import Any

from rich.console import Console
from rich.table import Table

from jaxspark.simulation.compile_check import Compiled
from jaxspark.simulation.traffic import Traffic

_GIB = 2**30


def report(console: Console, name: str, what: str, compiled: Compiled) -> None:
    """Memory, traffic, collectives, and whether it fits."""
    rows = compiled.program.rows
    shape = " x ".join(f"{axis} {n}" for axis, n in compiled.mesh.shape.items())
    table = Table(title=f"{name} · {what} · {compiled.slice.name} · {shape}")
    table.add_column("memory of one device")
    table.add_column("GiB", justify="right")
    for part, size in compiled.held.items():
        table.add_row(part, f"{size / _GIB:.2f}")
    table.add_section()
    table.add_row("most in use at once", f"{compiled.peak / _GIB:.2f}")
    chip = compiled.slice.chip
    table.add_row(f"there is of a {chip.name}", f"{compiled.memory / _GIB:.2f}")
    console.print(table)
    if compiled.traffic is not None:
        _report_round(console, compiled, compiled.traffic)
    if compiled.free < 0:
        console.print(
            f"[bold]does not fit[/bold]: {-compiled.free / _GIB:.2f} GiB are missing "
            "on each device"
        )
    else:
        console.print(
            f"fits, {compiled.free / _GIB:.2f} GiB left on each device: up to "
            f"{compiled.most_slots:,} {rows} of this length, or "
            f"{compiled.most_capacity:,} positions for each of {compiled.slots:,}"
        )


def _report_round(console: Console, compiled: Compiled, moved: Traffic) -> None:
    once = compiled.program.once
    table = Table(title=f"a {once}, on one device")
    for column in ("", "in all", "at full speed"):
        table.add_column(column, justify="left" if not column else "right")
    amounts = {
        "memory": f"{moved.memory / 1e9:.1f} GB",
        "arithmetic": f"{moved.flops / 1e12:.2f} TFLOP",
        "links": f"{moved.sent / 1e6:.1f} MB",
    }
    for bound, seconds in compiled.bounds.items():
        table.add_row(bound, amounts[bound], f"{1e3 * seconds:.2f} ms")
    console.print(table)

    table = Table(title=f"collectives of a {once}")
    for column in ("kind", "times", "MB leave a device"):
        table.add_column(column, justify="right" if column != "kind" else "left")
    for kind, entry in moved.by_kind().items():
        table.add_row(kind, f"{entry['times']:,}", f"{entry['bytes'] / 1e6:.2f}")
    console.print(table)

    bound, seconds = max(compiled.bounds.items(), key=lambda pair: pair[1])
    console.print(
        f"{compiled.tokens:,} tokens of {compiled.slots} {compiled.program.rows} x "
        f"{compiled.capacity:,} positions; a {once} takes at least "
        f"{1e3 * seconds:.1f} ms, bound by {bound}; "
        f"compiled in {compiled.seconds:.0f} s"
    )


def figures(name: str, what: str, compiled: Compiled) -> dict[str, Any]:
    """The same for files."""
    return {
        "config": name,
        "what": what,
        "topology": compiled.slice.name,
        "mesh": dict(compiled.mesh.shape),
        "slots": compiled.slots,
        "capacity": compiled.capacity,
        "tokens": compiled.tokens,
        "bytes": compiled.held | {"peak": compiled.peak},
        "memory": compiled.memory,
        "fits": compiled.free >= 0,
        "most_slots": compiled.most_slots,
        "most_capacity": compiled.most_capacity,
        "compile_seconds": round(compiled.seconds, 1),
    } | _round_figures(compiled)


def _round_figures(compiled: Compiled) -> dict[str, Any]:
    if compiled.traffic is None:
        return {}
    bound, seconds = max(compiled.bounds.items(), key=lambda pair: pair[1])
    return {
        "round": {
            "memory_bytes": compiled.traffic.memory,
            "flops": compiled.traffic.flops,
            "link_bytes": compiled.traffic.sent,
            "seconds": compiled.bounds,
            "bound": bound,
            "at_least_seconds": seconds,
        },
        "collectives": compiled.traffic.by_kind(),
    }
