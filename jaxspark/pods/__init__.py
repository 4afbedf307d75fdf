"""Job files: what a cluster reads to run one jaxspark command on several hosts.

Every host runs the same command. How its processes find each other depends on the
cluster: JAX detects TPU slices on GKE and Slurm by itself (`--distributed=auto`), GPU
pods are told through the environment (JAXSPARK_COORDINATOR and its companions).
"""

from jaxspark.pods.accelerators import Accelerator, parse_accelerator
from jaxspark.pods.jobset import jobset
from jaxspark.pods.leaderworkerset import leaderworkerset
from jaxspark.pods.options import PodOptions
from jaxspark.pods.slurm import slurm_script

__all__ = [
    "Accelerator",
    "PodOptions",
    "jobset",
    "leaderworkerset",
    "parse_accelerator",
    "slurm_script",
]
