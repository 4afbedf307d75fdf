"""Options of one request by the names that commands give them."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from jaxspark.calibration.files import MissingCalibration, load_calibration
from jaxspark.calibration.measuring import with_measured_costs
from jaxspark.calibration.profile import Setting, find_profile, load_profiles
from jaxspark.decoding import (
    Calibration,
    DecodeOptions,
    Estimator,
    Fixed,
    parse_schedule,
)
from jaxspark.decoding.couplings import Coupling
from jaxspark.decoding.options import check_block_length
from jaxspark.decoding.schedule import CostAware
from jaxspark.drafters import Drafter
from jaxspark.generation.generate import round_capacity

Confidences = Literal["auto", "calibrated", "online", "raw"]
CONFIDENCES = get_args(Confidences)


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
    confidences: Confidences = "auto",
    measure: bool = True,
) -> tuple[DecodeOptions, int]:
    """How requests are decoded; a schedule that weighs costs gets them.

    Args:
      schedule: its name, as for `parse_schedule`.
      costs: a file of `save_profiles`, for a schedule that needs some.
      target: a loaded target.
      drafter: what drafts.
      draft: its name, as for `load_drafter`.
      block_length: drafts per round; None takes the drafter's most.
      tokens: of the prompt and its output.
      coupling: "rejection" or "gumbel".
      temperature: of sampling.
      slots: requests decoded together.
      confidences: see `chosen_confidences`.
      measure: whether costs are measured where there is no file.

    Returns:
      options: with calibration and estimator, where they are needed.
      capacity: cache positions to decode with, those of the costs.

    Raises:
      ValueError: the costs are of something else, or a calibration is missing.
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
    calibration = estimator = None
    if block_length and not isinstance(chosen, Fixed):
        calibration, estimator = chosen_confidences(confidences, draft, coupling)
    options = DecodeOptions(
        block_length=block_length,
        coupling=coupling,
        schedule=chosen,
        calibration=calibration,
        estimator=estimator,
    )
    if measure:
        options = with_measured_costs(
            options,
            target,
            drafter,
            slots=slots,
            capacity=capacity,
            temperature=temperature,
        )
    return options, capacity


def chosen_confidences(
    name: Confidences, draft: str, coupling: Coupling
) -> tuple[Calibration | None, Estimator | None]:
    """Where survival comes from.

    Args:
      name: "calibrated" takes what `jaxspark calibrate` kept with the drafter, "online"
        learns while decoding, beginning there if there is any, "raw" takes confidences
        as they are; "auto" is "calibrated" where that was done and else "online".
      draft: the drafter's name, as for `load_drafter`.
      coupling: "rejection" or "gumbel".

    Raises:
      MissingCalibration: it is asked for.
      ValueError: it is damaged.
    """
    if name == "raw":
        return None, None
    if name == "calibrated":
        return load_calibration(draft, coupling), None
    try:
        calibration = load_calibration(draft, coupling)
    except MissingCalibration as error:
        if name == "auto":
            print(f"acceptance is learned while decoding: {error}", file=sys.stderr)
        return None, Estimator()
    return calibration, Estimator() if name == "online" else None


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
