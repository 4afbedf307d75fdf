"""Options of one request by the names that commands give them."""

import sys
from dataclasses import replace
from pathlib import Path

from jaxspark.calibration.files import MissingCalibration, load_calibration
from jaxspark.calibration.profile import (
    Setting,
    find_profile,
    load_profiles,
    with_measured_costs,
)
from jaxspark.decoding import Calibration, DecodeOptions, Fixed, parse_schedule
from jaxspark.decoding.couplings import Coupling
from jaxspark.decoding.options import check_block_length
from jaxspark.decoding.schedule import CostAware
from jaxspark.drafters import Drafter
from jaxspark.generation.generate import round_capacity


def chosen_options(
    schedule: str,
    costs: str | Path | None,
    target,
    drafter: Drafter,
    *,
    draft: str,
    block_length: int | None,
    tokens: int,
    coupling: Coupling,
    temperature: float,
    slots: int = 1,
) -> tuple[DecodeOptions, int]:
    """How requests are decoded; a schedule that weighs costs gets them.

    Args:
      schedule: its name, as for `parse_schedule`.
      costs: a file of `save_profiles`; None measures costs where a schedule needs some.
      target: a loaded target.
      drafter: what drafts.
      draft: its name, as for `load_drafter`.
      block_length: drafts per round; None takes the drafter's most.
      tokens: of the prompt and its output.
      coupling: "rejection" or "gumbel".
      temperature: of sampling.
      slots: requests decoded together.

    Returns:
      options: with the drafter's calibration, if it has one and it is needed.
      capacity: cache positions to decode with, those of the costs.

    Raises:
      ValueError: the costs are of something else.
    """
    chosen = parse_schedule(schedule)
    block_length = check_block_length(drafter, block_length)
    capacity = round_capacity(tokens + block_length)
    if isinstance(chosen, CostAware) and costs is not None:
        profiles = load_profiles(costs)
        roomy = [
            profile.setting.capacity
            for profile in profiles
            if profile.setting.slots == slots and profile.setting.capacity >= capacity
        ]
        capacity = min(roomy, default=capacity)
        here = Setting.of(
            target,
            drafter,
            slots=slots,
            block_length=block_length,
            capacity=capacity,
            coupling=coupling,
            sampled=temperature > 0,
        )
        chosen = replace(chosen, costs=find_profile(profiles, here).costs)
    fixed = isinstance(chosen, Fixed)
    options = DecodeOptions(
        block_length=block_length,
        coupling=coupling,
        schedule=chosen,
        calibration=None if fixed else find_calibration(draft, coupling),
    )
    options = with_measured_costs(
        options,
        target,
        drafter,
        slots=slots,
        capacity=capacity,
        temperature=temperature,
    )
    return options, capacity


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
