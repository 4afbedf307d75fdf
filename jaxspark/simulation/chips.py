"""Chips and slices that programs can be compiled for without having them.

    v5p:4x4x4    a TPU slice, by its topology
    h100:8       GPUs of one node, by their number

Their compilers come with `libtpu` and with JAX's CUDA plugin; neither asks for a chip.
Numbers are the makers': bytes and operations (bfloat16) per second of one device, and
bytes per second over all its links, one way. Of a TPU7x each of two cores is a device.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from jaxspark.parallel.mesh import AXES, parse_mesh

_GB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One device.

    Attributes:
      name: for reports.
      memory: bytes.
      bandwidth: bytes of it per second.
      flops: operations per second, a multiply-add counted twice.
      links: bytes per second that can leave it.
      per_chip: devices of a chip.
    """

    name: str
    memory: float
    bandwidth: float
    flops: float
    links: float
    per_chip: int = 1


CHIPS = {
    "v5e": Chip(
        name="TPU v5e", memory=16 * _GB, bandwidth=819e9, flops=197e12, links=200e9
    ),
    "v5p": Chip(
        name="TPU v5p", memory=95 * _GB, bandwidth=2765e9, flops=459e12, links=600e9
    ),
    "v6e": Chip(
        name="TPU v6e", memory=32 * _GB, bandwidth=1640e9, flops=918e12, links=448e9
    ),
    "tpu7x": Chip(
        name="TPU7x core",
        memory=96 * _GB,
        bandwidth=3690e9,
        flops=1153e12,
        links=600e9,
        per_chip=2,
    ),
    "h100": Chip(name="H100", memory=80e9, bandwidth=3350e9, flops=989e12, links=450e9),
}
H100_NAME = "NVIDIA H100 80GB HBM3"
# An XLA GpuTargetConfigProto, as text: an H100 SXM.
H100 = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 device_address_bits: 64
  pcie_bandwidth: 34359738368 ecc_enabled: true
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  device_vendor: "NVIDIA Corporation" name: "{H100_NAME}"
  platform_version: "Compute Capability 9.0a"
  driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{H100_NAME}"
"""
# Compiling asks no TPU for anything, and locks none.
_QUIETLY = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Devices to compile for, that need not be here.

    Attributes:
      name: for reports.
      chip: what each of them is.
      devices: as JAX describes them.
      topology: the compiler's description, which places meshes on its torus.
    """

    name: str
    chip: Chip
    devices: Sequence[Any]
    topology: Any

    def mesh(self, text: str) -> Mesh:
        """A mesh of all devices, its axes along the torus where they can be.

        Raises:
          ValueError: sizes that cannot be read, or that do not make the devices.
        """
        sizes = parse_mesh(text)
        shards = int(np.prod(list(sizes.values())))
        if shards != len(self.devices):
            of = f"{len(self.devices)} devices"
            if self.chip.per_chip > 1:
                of += f" ({self.chip.per_chip} of each chip)"
            raise ValueError(f"mesh {text!r} has {shards} shards, {self.name} has {of}")
        shape = tuple(sizes.values())
        try:
            devices = topologies.make_mesh(self.topology, shape, AXES).devices
        except (NotImplementedError, AssertionError, ValueError):
            # No way to lay these axes along the torus: in the order of devices.
            devices = np.array(self.devices).reshape(shape)
        return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parse_slice(text: str) -> Slice:
    """The devices that a text such as "v5p:4x4x4" or "h100:8" stands for.

    Raises:
      ValueError: there is no such chip or topology, or its compiler is not installed.
    """
    kind, _, shape = text.partition(":")
    if kind not in CHIPS:
        raise ValueError(f"{text}: unknown chip {kind!r}; expected {', '.join(CHIPS)}")
    pattern = r"[1-9]\d*" if kind == "h100" else r"[1-9]\d*(x[1-9]\d*){1,2}"
    if not re.fullmatch(pattern, shape):
        example = "h100:8" if kind == "h100" else f"{kind}:2x2"
        raise ValueError(f"{text}: expected a topology such as {example}")
    for name, value in _QUIETLY.items():
        os.environ.setdefault(name, value)
    try:
        if kind == "h100":
            topology = topologies.get_topology_desc(
                platform="cuda", target_config=H100, topology=f"1x{shape}x1"
            )
        else:
            topology = topologies.get_topology_desc(platform="tpu", topology_name=text)
    except Exception as error:
        wanted = "jaxspark[cuda13]" if kind == "h100" else "jaxspark[tpu]"
        raise ValueError(
            f"{text}: {str(error).splitlines()[0]} (its compiler comes with "
            f"pip install '{wanted}')"
        ) from error
    return Slice(
        name=text, chip=CHIPS[kind], devices=topology.devices, topology=topology
    )


def abstract(mesh: Mesh, tree: Any, specs: Any) -> Any:
    """Arrays that are only described, where they would lie on a mesh."""
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec)
        ),
        tree,
        specs,
    )
