"""Chips that programs are compiled for, here or not."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    use_abstract_mesh,
)

from jaxspark.parallel.rules import replicated_specs
from jaxspark.simulation.chips import H100_NAME, abstract, parse_slice

KINDS = {
    "tpu": AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu"),
    "h100": AbstractDevice(device_kind=H100_NAME, num_cores=132, platform="gpu"),
}


def device_of(platform: str):
    """A device to compile for: "cpu", "tpu" (v5e) or "h100"."""
    if platform == "cpu":
        return jax.devices("cpu")[0]
    return parse_slice("v5e:2x2" if platform == "tpu" else "h100:1").devices[0]


@contextmanager
def tracing_for(platform: str) -> Iterator[None]:
    """Within it, what is traced knows the chip that it will be compiled for."""
    if platform == "cpu":
        yield
        return
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=KINDS[platform])
    with use_abstract_mesh(mesh):
        yield


def on(device, tree):
    """Abstract arrays, placed on a device."""
    return abstract(Mesh(np.array([device]), ("x",)), tree, replicated_specs(tree))
