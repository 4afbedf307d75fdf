"""Chips that programs are compiled for, here or not."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)

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

KINDS = {
    "tpu": AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu"),
    "h100": AbstractDevice(device_kind=H100_NAME, num_cores=132, platform="gpu"),
}


def device_of(platform: str):
    """A device to compile for: "cpu", "tpu" (v5e) or "h100"."""
    if platform == "cpu":
        return jax.devices("cpu")[0]
    if platform == "tpu":
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    else:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=H100, topology="1x1x1"
        )
    return topology.devices[0]


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
    sharding = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )
