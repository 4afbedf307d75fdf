"""What to run and on what, the same for every kind of job file."""

import re
import shlex
from dataclasses import dataclass

from jaxspark.configuration import Configuration, ConfigurationError, option
from jaxspark.pods.accelerators import Accelerator, parse_accelerator

# It begins names of pods, which have at most 63 characters, up to 19 behind it.
NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)
VOLUME = re.compile(r"gs://[^/]+(/.+)?|pvc:.+")
RESTARTS = 3
# Flags by which processes find each other; a job file gives them.
OURS = ("distributed", "coordinator", "processes", "process_index")


@dataclass(frozen=True, kw_only=True)
class PodOptions(Configuration):
    """One command on all hosts of an accelerator."""

    command: str = option(
        'What every host runs, as in "train_draft --data=/data/answers.jsonl".'
    )
    accelerator: str = option(
        "A TPU slice by its topology (v5p:4x4x4, v6e:8x8, tpu7x:2x2x4) or a number of "
        "GPUs (h100:16, h100-mega:16, h200:8, b200:8)."
    )
    name: str = option("Name of the job.", "jaxspark")
    image: str | None = option("Container image with jaxspark in it.", None)
    namespace: str | None = option("Kubernetes namespace.", None)
    service_account: str | None = option(
        "Kubernetes service account, which a bucket must know.", None
    )
    volume: str | None = option(
        "What all hosts see as /data: a bucket (gs://BUCKET/FOLDER) or a persistent "
        "volume claim (pvc:NAME).",
        None,
    )
    environment: tuple[str, ...] | None = option(
        "Environment variables, as in HF_HUB_OFFLINE=1,JAX_LOG_COMPILES=1.", None
    )
    secret: str | None = option(
        "Kubernetes secret whose keys become environment variables.", None
    )
    restarts: int | None = option(
        f"Times that a JobSet or Slurm job starts anew after a failure; {RESTARTS} if "
        "not set. A LeaderWorkerSet does so without end.",
        None,
        at_least=0,
    )
    replicas: int | None = option(
        "Groups of a LeaderWorkerSet, each on an accelerator of its own; 1 if not set.",
        None,
        at_least=1,
    )
    gateway: str | None = option(
        "Gateway that sends requests to the replicas of a LeaderWorkerSet that serves, "
        "through an InferencePool.",
        None,
    )
    grace_seconds: int = option(
        "Time between SIGTERM and SIGKILL, to save a checkpoint or to finish requests.",
        120,
        at_least=1,
    )

    def __post_init__(self):
        super().__post_init__()
        try:
            parse_accelerator(self.accelerator)
        except ValueError as error:
            raise ConfigurationError(f"accelerator={error}") from error
        if not NAME.fullmatch(self.name):
            raise ConfigurationError(
                f"name={self.name}: expected at most 40 lower-case letters, digits and "
                "dashes, a letter first and no dash last"
            )
        if self.volume is not None and not VOLUME.fullmatch(self.volume):
            raise ConfigurationError(
                f"volume={self.volume}: expected gs://BUCKET, gs://BUCKET/FOLDER or "
                "pvc:NAME"
            )
        for each in self.environment or ():
            if not VARIABLE.fullmatch(each):
                raise ConfigurationError(f"environment={each}: expected NAME=VALUE")
        self._check_command()

    def _check_command(self) -> None:
        try:
            words = self.words()
        except ValueError as error:
            raise ConfigurationError(f"command={self.command}: {error}") from error
        for each in words:
            flag = each.removeprefix("--").partition("=")[0]
            if each.startswith("--") and flag in OURS:
                raise ConfigurationError(
                    f"command={self.command}: expected no --{flag}; the file adds it"
                )

    def machines(self) -> Accelerator:
        """Where it runs."""
        return parse_accelerator(self.accelerator)

    def words(self) -> list[str]:
        """The command as a program and its arguments."""
        words = shlex.split(self.command)
        return words if words[:1] == ["jaxspark"] else ["jaxspark", *words]

    def variables(self) -> dict[str, str]:
        """The environment's additions."""
        pairs = (each.partition("=") for each in self.environment or ())
        return {name: value for name, _, value in pairs}

    def most_restarts(self) -> int:
        """How often a job that ends may start anew."""
        return RESTARTS if self.restarts is None else self.restarts

    def only_of_pods(self) -> dict[str, str]:
        """The options that were given and that mean nothing outside Kubernetes."""
        options = {
            "image": self.image,
            "namespace": self.namespace,
            "service_account": self.service_account,
            "volume": self.volume,
            "secret": self.secret,
        }
        return {name: value for name, value in options.items() if value is not None}
