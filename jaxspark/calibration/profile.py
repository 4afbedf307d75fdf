"""Cost profiles: what a round costs on a device, by draft length and token bucket.

`measuring` makes them. A profile says what it was measured with, and is refused for
anything else.
"""

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import jax

from jaxspark.decoding import CostCurve, Costs
from jaxspark.parallel.mesh import mesh_in_use
from jaxspark.target import Target

FORMAT = "jaxspark-cost-profile-2"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a profile holds for.

    Attributes:
      device: kind of the devices, how many, and their mesh if there is one.
      target: kind, parameters and type of the target.
      drafter: of the drafter.
      slots: requests decoded together.
      block_length: drafts per round.
      capacity: cache positions of each request.
      coupling: "rejection" or "gumbel".
      sampled: whether requests sampled; greedy ones spare the work of sampling.
    """

    device: str
    target: str
    drafter: str
    slots: int
    block_length: int
    capacity: int
    coupling: str
    sampled: bool

    @classmethod
    def of(cls, target, drafter, **options) -> "Setting":
        """The setting on one of this machine's devices, or on the mesh in use."""
        kind, mesh = _kind(jax.devices()[0]), mesh_in_use()
        device = f"1 x {kind}"
        if mesh is not None:
            axes = ",".join(f"{name}:{size}" for name, size in mesh.shape.items())
            device = f"{mesh.size} x {kind}, mesh {axes}"
        return cls(
            device=device,
            target=_describe(Target.of(target).model),
            drafter=_describe(drafter),
            **options,
        )


def _kind(device) -> str:
    """The device's name; JAX calls every processor "cpu"."""
    if device.platform != "cpu":
        return device.device_kind
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = {
            each.partition(":")[2].strip() for each in lines if "model name" in each
        }
    except OSError:
        names = set()
    name = " and ".join(sorted(names)) or platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _describe(model) -> str:
    leaves = jax.tree.leaves(model)
    count = sum(leaf.size for leaf in leaves)
    kinds = sorted({str(leaf.dtype) for leaf in leaves if leaf.size > 1})
    return f"{type(model).__name__}, {count:,} parameters {'/'.join(kinds)}".strip()


@dataclass(frozen=True, kw_only=True)
class CostProfile:
    """Costs and the setting they were measured in."""

    setting: Setting
    costs: Costs

    def check(self, setting: Setting) -> None:
        """Raises `ValueError` if it was made for something else."""
        for name, mine in asdict(self.setting).items():
            theirs = getattr(setting, name)
            if mine != theirs:
                raise ValueError(
                    f"the cost profile was made for another {name}: {mine!r}, this is "
                    f"{theirs!r}; make one with `jaxspark profile_cost`"
                )


def save_profiles(path: str | Path, profiles: Iterable[CostProfile]) -> None:
    """Writes profiles as JSON."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "profiles": [asdict(each) for each in profiles]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def load_profiles(path: str | Path) -> list[CostProfile]:
    """Reads what `save_profiles` wrote.

    Raises:
      ValueError: the file is no list of cost profiles.
    """
    try:
        content = json.loads(Path(path).read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format is {content['format']!r}, expected {FORMAT!r}")
        return [_profile(entry) for entry in content["profiles"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: holds no cost profiles ({error!r})") from error


def _profile(entry: dict) -> CostProfile:
    curves = (
        CostCurve(each["draft_length"], tuple(each["sizes"]), tuple(each["seconds"]))
        for each in entry["costs"]["curves"]
    )
    return CostProfile(setting=Setting(**entry["setting"]), costs=Costs(tuple(curves)))


def find_profile(profiles: Iterable[CostProfile], setting: Setting) -> CostProfile:
    """The profile made for a setting.

    Raises:
      ValueError: there is none; says what the nearest was made for.
    """
    profiles = list(profiles)
    if not profiles:
        raise ValueError("no cost profiles given")

    def differences(profile):
        mine, theirs = asdict(profile.setting), asdict(setting)
        return sum(mine[name] != theirs[name] for name in mine)

    nearest = min(profiles, key=differences)
    nearest.check(setting)
    return nearest
