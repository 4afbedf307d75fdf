"""Token buckets for a load that changes: a few outputs do not pay for all slots."""

from dataclasses import replace

from jaxspark.decoding import DecodeOptions, Fixed
from jaxspark.decoding.costs import guessed_costs
from jaxspark.decoding.options import check_block_length
from jaxspark.decoding.schedule import CostAware
from jaxspark.drafters import Drafter


def with_buckets(options: DecodeOptions, drafter: Drafter, slots: int) -> DecodeOptions:
    """Options with a bucket for whole blocks of 1, 2, 4, ... and all slots.

    Those that choose their buckets, and those of a schedule that does, stay as they
    are. Each bucket is a program of its own inside the compiled loop.

    Args:
      options: how rounds draft, schedule and verify.
      drafter: what proposes.
      slots: of one shard.
    """
    schedule = options.schedule
    if options.buckets is not None or not isinstance(schedule, Fixed):
        return options
    length = check_block_length(drafter, options.block_length)
    if schedule.length is not None:
        length = min(length, schedule.length)
    if not length:
        return options
    running = [2**n for n in range(slots.bit_length()) if 2**n < slots]
    sizes = {count * (length + 1) for count in (*running, slots)}
    if drafter.may_skip:  # Rounds in which nobody has a draft.
        sizes.add(slots)
    return replace(options, buckets=tuple(sorted(sizes)))


def with_guessed_costs(
    options: DecodeOptions, drafter: Drafter, slots: int
) -> DecodeOptions:
    """Options whose schedule can decide, until its rounds are timed.

    Args:
      options: how rounds draft, schedule and verify.
      drafter: what proposes.
      slots: of one shard.
    """
    schedule = options.schedule
    if not isinstance(schedule, CostAware) or not schedule.needs_costs:
        return options
    length = check_block_length(drafter, options.block_length)
    costs = guessed_costs(slots, length, options.buckets)
    return replace(options, schedule=replace(schedule, costs=costs), buckets=None)
