r"""Writes the file by which a cluster runs a jaxspark command on several hosts.

  jaxspark pods --accelerator=v5p:4x4x4 --image=IMAGE --volume=gs://BUCKET/dspark \
      --command="train_draft --data=/data/answers.jsonl --out=/data/run --steps=3000"
  jaxspark pods --accelerator=h100:16 --image=IMAGE --volume=pvc:models \
      --command="bench --suite=load --target=/data/model" --out=bench.yaml
  jaxspark pods --kind=slurm --accelerator=h100:16 --out=train.sh \
      --command="train_draft --data=answers.jsonl --out=runs/dspark --steps=3000"

A JobSet (for commands that end) or a LeaderWorkerSet (for those that stay) with GKE's
labels of TPU slices and GPU nodes, or a Slurm batch script. The number of hosts follows
from the accelerator. Nothing is submitted: that is for kubectl and sbatch.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from jaxspark.configuration import option
from jaxspark.launch import program
from jaxspark.pods.jobset import jobset
from jaxspark.pods.leaderworkerset import leaderworkerset
from jaxspark.pods.options import PodOptions
from jaxspark.pods.slurm import slurm_script
from jaxspark.pods.template import Manifest


@dataclass(frozen=True, kw_only=True)
class Config(PodOptions):
    """What to run, for which cluster."""

    kind: str = option(
        "What reads the file.",
        "jobset",
        choices=("jobset", "leaderworkerset", "slurm"),
    )
    out: str | None = option("File to write; printed if not set.", None)

    def __post_init__(self):
        super().__post_init__()
        launcher = self.words()[1:2]
        if not launcher or not _exists(launcher[0]):
            raise ValueError(
                f"--command={self.command}: expected a launcher first; `jaxspark "
                "--help` lists them"
            )
        if self.kind == "slurm":
            self._check_slurm()
        elif self.image is None:
            raise ValueError(f"--kind={self.kind} needs an --image to run")
        if self.kind == "leaderworkerset" and self.restarts is not None:
            raise ValueError(
                f"--restarts={self.restarts}: a LeaderWorkerSet restarts without end"
            )

    def _check_slurm(self) -> None:
        if self.machines().is_tpu:
            raise ValueError(
                f"--accelerator={self.accelerator}: expected GPUs, such as h100:16, "
                "with --kind=slurm"
            )
        if given := self.only_of_pods():
            raise ValueError(
                f"--{', --'.join(given)}: expected no such flag with --kind=slurm, "
                "whose hosts share an installation and a file system"
            )


def _exists(launcher: str) -> bool:
    return launcher.isidentifier() and (
        importlib.util.find_spec(f"{__package__}.{launcher}") is not None
    )


def job_file(config: Config) -> str:
    """The file's text."""
    if config.kind == "slurm":
        return slurm_script(config)
    make: Callable[[Config], Manifest] = {
        "jobset": jobset,
        "leaderworkerset": leaderworkerset,
    }[config.kind]
    # Long arguments stay on one line, and fields in the order they are explained in.
    return yaml.safe_dump(make(config), sort_keys=False, width=1000)


def main(config: Config) -> None:
    """Prints or writes the file."""
    text = job_file(config)
    if config.out is None:
        print(text, end="")
    else:
        Path(config.out).write_text(text, "utf-8")
        machines = config.machines()
        print(
            f"wrote {config.out} ({machines.hosts} hosts with "
            f"{machines.chips_per_host} chips each)"
        )


if __name__ == "__main__":
    program.run(main, Config)
