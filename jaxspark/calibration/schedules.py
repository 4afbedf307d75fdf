"""A schedule by name, with the costs and the calibration that belong to it."""

import sys
from dataclasses import replace
from pathlib import Path

from jaxspark.calibration.files import MissingCalibration, load_calibration
from jaxspark.calibration.profile import Setting, find_profile, load_profiles
from jaxspark.decoding import Calibration, Fixed, Scheduler, parse_schedule
from jaxspark.decoding.couplings import Coupling
from jaxspark.decoding.schedule import CostAware
from jaxspark.drafters import Drafter


def chosen_schedule(
    name: str,
    costs: str | Path | None,
    target,
    drafter: Drafter,
    *,
    draft: str,
    block_length: int,
    capacity: int,
    coupling: Coupling,
    temperature: float,
) -> tuple[Scheduler, Calibration | None, int]:
    """The schedule of one request, and what belongs to it.

    Args:
      name: as for `parse_schedule`.
      costs: a file of `save_profiles`, for schedules that weigh costs; None for none.
      target: a loaded target.
      drafter: what drafts.
      draft: its name, as for `load_drafter`.
      block_length: drafts per round.
      capacity: cache positions needed.
      coupling: "rejection" or "gumbel".
      temperature: of sampling.

    Returns:
      schedule: with its costs, if the file has them.
      calibration: None if there is none, or nothing to calibrate.
      capacity: cache positions to decode with, those of the costs.

    Raises:
      ValueError: the costs are of something else.
    """
    schedule = parse_schedule(name)
    if isinstance(schedule, CostAware) and costs is not None:
        profiles = load_profiles(costs)
        roomy = [
            profile.setting.capacity
            for profile in profiles
            if profile.setting.slots == 1 and profile.setting.capacity >= capacity
        ]
        capacity = min(roomy, default=capacity)
        here = Setting.of(
            target,
            drafter,
            slots=1,
            block_length=block_length,
            capacity=capacity,
            coupling=coupling,
            sampled=temperature > 0,
        )
        schedule = replace(schedule, costs=find_profile(profiles, here).costs)
    if isinstance(schedule, Fixed):
        return schedule, None, capacity
    return schedule, find_calibration(draft, coupling), capacity


def find_calibration(draft: str, coupling: Coupling) -> Calibration | None:
    """A drafter's calibration; None, with a notice, if it has none.

    Raises:
      ValueError: it is damaged.
    """
    try:
        return load_calibration(draft, coupling)
    except MissingCalibration as error:
        print(f"confidences are used as they are: {error}", file=sys.stderr)
        return None
