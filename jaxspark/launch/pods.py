r"""Writes the file by which a cluster runs a jaxspark command on several hosts.

  jaxspark pods --accelerator=v5p:4x4x4 --image=IMAGE --volume=gs://BUCKET/dspark \
      --command="train_draft --data=/data/answers.jsonl --out=/data/run --steps=3000"
  jaxspark pods --accelerator=h100:16 --image=IMAGE --volume=pvc:models \
      --command="bench --suite=load --target=/data/model" --out=bench.yaml
  jaxspark pods --kind=slurm --accelerator=h100:16 --out=train.sh \
      --command="train_draft --data=answers.jsonl --out=runs/dspark --steps=3000"

  jaxspark pods --kind=leaderworkerset --accelerator=v6e:4x4 --image=IMAGE \
      --replicas=2 --gateway=inference-gateway --volume=gs://BUCKET/flash \
      --command="serve --target=/data/model --mesh=model:16 --served_name=flash"

A JobSet (for commands that end) or a LeaderWorkerSet (for those that stay) with GKE's
labels of TPU slices and GPU nodes, or a Slurm batch script. The number of hosts follows
from the accelerator. A LeaderWorkerSet that serves has probes and a Service with it.
Nothing is submitted: that is for kubectl and sbatch.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import yaml

from jaxspark.configuration import option
from jaxspark.launch import program
from jaxspark.pods import serving
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
        if self.kind == "leaderworkerset":
            self._check_leaderworkerset()
        elif given := self._only_of_leaderworkersets():
            raise ValueError(
                f"--{', --'.join(given)}: expected no such flag with --kind={self.kind}"
            )

    def _check_leaderworkerset(self) -> None:
        if self.restarts is not None:
            raise ValueError(
                f"--restarts={self.restarts}: a LeaderWorkerSet restarts without end"
            )
        if serving.serves(self):
            serving.check(self)
        elif self.gateway is not None:
            raise ValueError(
                f"--gateway={self.gateway}: expected a --command that serves"
            )

    def _only_of_leaderworkersets(self) -> list[str]:
        options = {"replicas": self.replicas, "gateway": self.gateway}
        return [name for name, value in options.items() if value is not None]

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
    manifests = [jobset(config)] if config.kind == "jobset" else _group(config)
    # Long arguments stay on one line, and fields in the order they are explained in.
    return yaml.dump_all(manifests, Dumper=_Plain, sort_keys=False, width=1000)


def _group(config: Config) -> list[Manifest]:
    """A LeaderWorkerSet, and by what it is reached if it serves."""
    manifests = [leaderworkerset(config)]
    if serving.serves(config):
        manifests.append(serving.service(config))
    if config.gateway is not None:
        manifests.append(serving.inference_pool(config))
        manifests.append(serving.http_route(config, config.gateway))
    return manifests


class _Plain(yaml.SafeDumper):
    """What leaders and workers have in common is written out for both."""

    def ignore_aliases(self, data: object) -> bool:
        """All of it."""
        return True


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
