"""Meshes of devices: what lies where, and what all shards must agree on."""

from jaxspark.parallel.mesh import check_mesh, make_mesh, shard

__all__ = ["check_mesh", "make_mesh", "shard"]
