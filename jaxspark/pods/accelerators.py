"""Accelerators by name: `v5p:4x4x4` is a TPU slice, `h100:16` a number of GPUs.

A slice has one of the topologies that GKE offers, and its hosts and their chips follow
from it: four chips a host, but up to eight chips of a 2D kind are on one. The labels
are those that GKE gives its nodes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

TPU, GPU = "google.com/tpu", "nvidia.com/gpu"


@dataclass(frozen=True)
class Tpu:
    """A kind of TPU: the label of its nodes, and the shape of a whole pod."""

    label: str
    pod: tuple[int, ...]


TPUS = {
    "v5e": Tpu("tpu-v5-lite-podslice", (16, 16)),
    "v5p": Tpu("tpu-v5p-slice", (16, 20, 28)),
    "v6e": Tpu("tpu-v6e-slice", (16, 16)),
    "tpu7x": Tpu("tpu7x", (16, 24, 24)),
}
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# Parts of a 4x4x4 cube. Larger slices are built of whole cubes.
PARTS = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")

GPUS = {
    "h100": "nvidia-h100-80gb",
    "h100-mega": "nvidia-h100-mega-80gb",
    "h200": "nvidia-h200-141gb",
    "b200": "nvidia-b200",
}
GPUS_PER_NODE = 8


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """The machines of a job.

    Attributes:
      hosts: how many there are.
      chips_per_host: how many chips each has.
      resource: Kubernetes' name of a chip.
      node_labels: labels of the nodes that have such machines.
    """

    hosts: int
    chips_per_host: int
    resource: str
    node_labels: Mapping[str, str]

    @property
    def is_tpu(self) -> bool:
        """Whether it is a TPU slice."""
        return self.resource == TPU


def parse_accelerator(text: str) -> Accelerator:
    """The machines that a name stands for.

    Args:
      text: `CHIP:TOPOLOGY` of a TPU slice or `CHIP:COUNT` of GPUs.

    Raises:
      ValueError: there is no such chip, or none in that shape or number.
    """
    chip, _, size = text.partition(":")
    if chip in TPUS:
        return _slice(text, TPUS[chip], size)
    if chip in GPUS:
        return _nodes(text, GPUS[chip], size)
    known = ", ".join((*TPUS, *GPUS))
    raise ValueError(f"{text}: unknown accelerator {chip!r}; expected one of {known}")


def _slice(text: str, tpu: Tpu, size: str) -> Accelerator:
    dimensions = len(tpu.pod)
    example = "x".join(["4"] * dimensions)
    sides = size.split("x")
    if not all(side.isdecimal() for side in sides):
        raise ValueError(f"{text}: expected a topology, such as {example}")
    shape = tuple(map(int, sides))
    if len(shape) != dimensions:
        raise ValueError(
            f"{text}: expected a topology of {dimensions} dimensions, such as "
            f"{example}, not of {len(shape)}"
        )
    topology, chips = "x".join(map(str, shape)), prod(shape)
    if dimensions == 2:
        possible, expected = topology in FLAT, ", ".join(FLAT)
    else:
        whole = all(side > 0 and side % 4 == 0 for side in shape)
        ascending = shape == tuple(sorted(shape))
        fits = chips <= prod(tpu.pod)
        possible = topology in PARTS or (whole and ascending and fits)
        expected = (
            f"{', '.join(PARTS)}, or ascending multiples of 4 with at most "
            f"{prod(tpu.pod)} chips"
        )
    if not possible:
        raise ValueError(f"{text}: there is no such slice; expected {expected}")
    chips_per_host = chips if dimensions == 2 and chips <= 8 else 4
    return Accelerator(
        hosts=chips // chips_per_host,
        chips_per_host=chips_per_host,
        resource=TPU,
        node_labels={
            "cloud.google.com/gke-tpu-accelerator": tpu.label,
            "cloud.google.com/gke-tpu-topology": topology,
        },
    )


def _nodes(text: str, label: str, count: str) -> Accelerator:
    gpus = int(count) if count.isdecimal() else 0
    if gpus not in (1, 2, 4) and (gpus == 0 or gpus % GPUS_PER_NODE):
        raise ValueError(
            f"{text}: expected 1, 2 or 4 GPUs of one node, or a multiple of "
            f"{GPUS_PER_NODE}, as in h100:16"
        )
    chips_per_host = min(gpus, GPUS_PER_NODE)
    return Accelerator(
        hosts=gpus // chips_per_host,
        chips_per_host=chips_per_host,
        resource=GPU,
        node_labels={"cloud.google.com/gke-accelerator": label},
    )
