"""What a round would cost on machines we do not have, from a stated roofline.

A pass over T tokens takes as long as the slower of its memory traffic and its
arithmetic, plus a constant for launches and communication:

    seconds(T) = overhead + max(bytes(T) / bandwidth, flops(T) / peak)
    bytes(T)   = dense weights + routed experts that T tokens reach + caches read
    flops(T)   = 2 * active parameters * T

T tokens that choose k of E experts evenly reach E (1 - (1 - k/E)^T) of them. All of it
is an estimate: what it leads to is *simulated*, never measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from jaxspark.decoding import CostCurve, Costs
from jaxspark.decoding.costs import within_ladder


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Chips that hold one copy of a model together.

    Attributes:
      name: for reports.
      chips: how many.
      bandwidth: memory bytes per second of one chip.
      flops: multiply-adds counted twice, per second of one chip, in the type used.
      efficiency: share of both that programs reach.
      overhead: seconds a pass takes however small: launches, communication.
    """

    name: str
    chips: int
    bandwidth: float
    flops: float
    efficiency: float
    overhead: float


@dataclass(frozen=True, kw_only=True)
class Network:
    """A model as the roofline sees it.

    Attributes:
      name: for reports.
      dense_bytes: weights that every pass reads.
      experts, experts_per_token: routed experts of a layer, and how many a token uses;
        no experts for a dense model.
      expert_bytes: of one expert index, over all layers.
      active: parameters a token is multiplied with.
      cache_bytes: cache read for each request and pass.
    """

    name: str
    dense_bytes: float
    experts: int
    experts_per_token: int
    expert_bytes: float
    active: float
    cache_bytes: float

    def seconds(
        self, machine: Machine, tokens: Int[np.ndarray, " N"], requests: int
    ) -> Float[np.ndarray, " N"]:
        """Of passes over so many tokens of so many requests."""
        missed = 1 - self.experts_per_token / max(self.experts, 1)
        reached = self.experts * (1 - missed ** np.asarray(tokens, float))
        read = (
            self.dense_bytes + self.expert_bytes * reached + self.cache_bytes * requests
        )
        share = machine.chips * machine.efficiency
        memory = read / (share * machine.bandwidth)
        arithmetic = 2 * self.active * np.asarray(tokens) / (share * machine.flops)
        return machine.overhead + np.maximum(memory, arithmetic)


def roofline_costs(
    machine: Machine,
    target: Network,
    drafter: Network,
    *,
    requests: int,
    sizes: Sequence[int],
    draft_lengths: Sequence[int],
    draft_overhead: float = 0.0,
) -> Costs:
    """Costs of rounds with each draft length and token bucket.

    Args:
      machine: runs both.
      target: verifies.
      drafter: drafts all tokens of every request in one pass.
      requests: decoded together.
      sizes: token buckets, ascending.
      draft_lengths: drafts per request, ascending; 0 for rounds without drafter.
      draft_overhead: constant seconds of the drafter's pass, in the machine's place.
    """
    curves = []
    for length in draft_lengths:
        verified = within_ladder(tuple(sizes), requests * (length + 1))
        seconds = target.seconds(machine, np.array(verified), requests)
        if length:
            rows = np.array([requests * length])
            seconds = seconds + drafter.seconds(machine, rows, requests)
            seconds = seconds + draft_overhead - machine.overhead
        rising = np.maximum.accumulate(seconds)
        curves.append(CostCurve(length, verified, tuple(rising.tolist())))
    return Costs(tuple(curves))
