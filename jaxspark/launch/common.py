"""Options that launchers share, and what they stand for."""

import os
from dataclasses import dataclass

import jax.numpy as jnp
from rich.console import Console

from jaxspark import load_target
from jaxspark.calibration.schedules import CONFIDENCES, Confidences
from jaxspark.checkpoints import Target
from jaxspark.configuration import Configuration, option
from jaxspark.decoding import parse_schedule
from jaxspark.decoding.couplings import COUPLINGS, Coupling
from jaxspark.decoding.schedule import CostAware
from jaxspark.launch.devices import DeviceOptions
from jaxspark.text import Tokenizer

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Letters of a line where no terminal says how many.
_WIDTH = 140


def console(*, stderr: bool = False) -> Console:
    """Where a launcher prints; in files and logs tables have room."""
    made = Console(stderr=stderr)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _WIDTH
    return made


@dataclass(frozen=True, kw_only=True)
class ModelOptions(DeviceOptions):
    """The target model, whatever it is for."""

    target: str = option(
        "Target model: a built-in name, a folder of safetensors, a .gguf file or a "
        "Hugging Face Hub id.",
        "smollm2-135m-instruct",
    )
    dtype: str = option("Type of weights and caches.", "float32", choices=tuple(DTYPES))


@dataclass(frozen=True, kw_only=True)
class TargetOptions(ModelOptions):
    """The target model, to be run."""

    keep_quantized: bool = option(
        "Leave the FP8 and FP4 matrices of a DeepSeek-V4 folder so in memory.", False
    )

    def load(self) -> tuple[Target, Tokenizer]:
        """The target and its tokenizer.

        Raises:
          ValueError: it has none.
        """
        target = load_target(
            self.target, dtype=DTYPES[self.dtype], keep_quantized=self.keep_quantized
        )
        if target.tokenizer is None:
            raise ValueError(f"{self.target} has no tokenizer, which text prompts need")
        return target, target.tokenizer


def draft_option(default: str):
    """The option `draft` of a launcher."""
    return option(
        'Drafter: "ngram" (prompt lookup), "none" (plain decoding), "dspark" (the '
        "trained one for the default target), a folder or a Hugging Face Hub id; "
        '"hybrid:" before one puts prompt lookup beside it.',
        default,
    )


def json_option():
    """The option `json_out` of a launcher."""
    return option("File for the figures.", None)


@dataclass(frozen=True, kw_only=True)
class DraftOptions(Configuration):
    """The drafter and what it is asked for."""

    draft: str = draft_option("ngram")
    block_length: int | None = option(
        "Drafts per round; by default the most the drafter can propose.",
        None,
        at_least=1,
    )


@dataclass(frozen=True, kw_only=True)
class CouplingOptions(Configuration):
    """How draft and target are tied."""

    coupling: Coupling = option(
        "How draft and target are tied: rejection accepts most, gumbel gives the very "
        "tokens of plain sampling with the same seed.",
        "rejection",
        choices=COUPLINGS,
    )


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions(Configuration):
    """How much of the drafts is verified."""

    schedule: str = option(
        "What is verified: fixed (all drafts), fixed:LENGTH, threshold:SURVIVAL, or by "
        "what rounds cost: causal, lagged, lagged:LAG, free (needs --coupling=gumbel).",
        "fixed",
    )
    costs: str | None = option(
        "JSON of jaxspark profile_cost; without it costs are measured at the start.",
        None,
    )
    confidences: Confidences = option(
        "How likely drafts survive, for schedules: calibrated (what jaxspark calibrate "
        "kept with the drafter), online (learned while decoding, from there on), raw; "
        "auto is calibrated where that was done, else online.",
        "auto",
        choices=CONFIDENCES,
    )

    def __post_init__(self):
        super().__post_init__()
        weighs = isinstance(parse_schedule(self.schedule), CostAware)
        if self.costs is not None and not weighs:
            raise ValueError(
                "--costs are for schedules that weigh them (causal, lagged, free), not "
                f"--schedule={self.schedule}"
            )
