"""Flags that launchers share, and what they stand for."""

import dataclasses
import json
import math
import pathlib
import sys

import jax.numpy as jnp
from absl import flags

from jaxspark import load_target
from jaxspark.calibration.files import MissingCalibration, load_calibration
from jaxspark.calibration.profile import Setting, find_profile, load_profiles
from jaxspark.decoding import Fixed, parse_schedule
from jaxspark.decoding.couplings import COUPLINGS
from jaxspark.decoding.schedule import CostAware
from jaxspark.evaluation.prompts import PROMPTS, load_prompts

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def define_model_flags(
    *, draft: str | None = "ngram", keep_quantized: bool = True
) -> None:
    """--target and --dtype, with flags for drafters and quantized matrices.

    Args:
      draft: default of --draft, which --block_length goes with; None defines neither.
      keep_quantized: whether to define --keep_quantized.
    """
    flags.DEFINE_string(
        "target",
        "smollm2-135m-instruct",
        "Target model: a built-in name, a folder of safetensors, a .gguf file or a "
        "Hugging Face Hub id.",
    )
    flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Type of weights and caches.")
    if keep_quantized:
        flags.DEFINE_bool(
            "keep_quantized",
            False,
            "Leave the FP8 and FP4 matrices of a DeepSeek-V4 folder so in memory.",
        )
    if draft is not None:
        flags.DEFINE_string(
            "draft",
            draft,
            'Drafter: "ngram" (prompt lookup), "none" (plain decoding), "dspark" (the '
            "trained one for the default target), a folder or a Hugging Face "
            'Hub id; "hybrid:" before one puts prompt lookup beside it.',
        )
        flags.DEFINE_integer(
            "block_length",
            None,
            "Drafts per round; by default the most the drafter can propose.",
            lower_bound=1,
        )


def define_sampling_flags() -> None:
    """--temperature, --top_k, --top_p, --min_p, --seed and --coupling."""
    flags.DEFINE_float("temperature", 0.0, "0 decodes greedily.")
    flags.DEFINE_integer("top_k", 0, "Keep the k most likely tokens; 0 keeps all.")
    flags.DEFINE_float("top_p", 1.0, "Keep the most likely tokens of this mass.")
    flags.DEFINE_float("min_p", 0.0, "Keep tokens this likely relative to the best.")
    flags.DEFINE_integer("seed", 0, "Seed of the request's randomness.")
    define_coupling_flag(
        "How draft and target are tied: rejection accepts most, gumbel gives the very "
        "tokens of plain sampling with the same seed."
    )


def define_coupling_flag(text: str = "See jaxspark generate.") -> None:
    """--coupling."""
    flags.DEFINE_enum("coupling", "rejection", COUPLINGS, text)


def define_prompts_flag() -> None:
    """--prompts_dir, for `load_domains`."""
    flags.DEFINE_string(
        "prompts_dir",
        None,
        "Folder with <domain>_prompts.jsonl files of math, code and chat; by default "
        "the prompts that come with jaxspark, 20 of each.",
    )


def load_domains(
    tokenizer, *, per_domain: int, max_tokens: int = 384
) -> dict[str, list[list[int]]]:
    """The prompts of --prompts_dir as token ids by domain, evenly chosen.

    Says what is used where that is not what the package brings.

    Args:
      tokenizer: with a chat template.
      per_domain: prompts wanted of each domain.
      max_tokens: longer prompts are passed over.

    Raises:
      ValueError: a file is missing, malformed or without prompts.
    """
    folder = flags.FLAGS.prompts_dir
    domains = load_prompts(
        PROMPTS if folder is None else folder,
        tokenizer,
        per_domain=per_domain,
        max_tokens=max_tokens,
    )
    if folder is not None:
        used = ", ".join(f"{len(each)} of {name}" for name, each in domains.items())
        print(f"prompts of {folder}: {used}", file=sys.stderr)
    return domains


def positive(name: str) -> list[int]:
    """The whole numbers of a list flag.

    Raises:
      ValueError: one that is no number, or not positive.
    """
    try:
        numbers = [int(each) for each in flags.FLAGS[name].value]
    except ValueError as error:
        raise ValueError(f"--{name}: {error}") from error
    if not numbers or min(numbers) < 1:
        raise ValueError(f"--{name} must be positive, got {numbers}")
    return numbers


def define_schedule_flags() -> None:
    """--schedule and --costs; beside the flags of `define_model_flags`."""
    flags.DEFINE_string(
        "schedule",
        "fixed",
        "What is verified: fixed (all drafts), fixed:LENGTH, threshold:SURVIVAL, or by "
        "what rounds cost: causal, lagged, lagged:LAG, free (needs --coupling=gumbel).",
    )
    flags.DEFINE_string(
        "costs",
        None,
        "JSON of jaxspark profile_cost; without it costs are measured at the start.",
    )


def chosen_schedule(target, drafter, *, slots, block_length, capacity, temperature):
    """What --schedule, --costs and the drafter's calibration say.

    Args:
      target: a loaded target.
      drafter: of --draft.
      slots: requests decoded together.
      block_length: drafts per round.
      capacity: cache positions needed.
      temperature: of sampling.

    Returns:
      schedule: with its costs, if --costs has them.
      calibration: None if there is none, or nothing to calibrate.
      capacity: cache positions to decode with, those of the costs.

    Raises:
      ValueError: costs of something else, or for a schedule that weighs none.
    """
    schedule = parse_schedule(flags.FLAGS.schedule)
    if flags.FLAGS.costs is not None and not isinstance(schedule, CostAware):
        raise ValueError(
            "--costs are for schedules that weigh them (causal, lagged, free), not "
            f"--schedule={flags.FLAGS.schedule}"
        )
    if isinstance(schedule, Fixed):
        return schedule, None, capacity
    if flags.FLAGS.costs is not None:
        profiles = load_profiles(flags.FLAGS.costs)
        roomy = [
            profile.setting.capacity
            for profile in profiles
            if profile.setting.slots == slots and profile.setting.capacity >= capacity
        ]
        capacity = min(roomy, default=capacity)
        here = Setting.of(
            target,
            drafter,
            slots=slots,
            block_length=block_length,
            capacity=capacity,
            coupling=flags.FLAGS.coupling,
            sampled=temperature > 0,
        )
        costs = find_profile(profiles, here).costs
        schedule = dataclasses.replace(schedule, costs=costs)
    return schedule, find_calibration(), capacity


def find_calibration():
    """The calibration of --draft under --coupling; None, with a notice, if it has none.

    Raises:
      ValueError: it is damaged.
    """
    try:
        return load_calibration(flags.FLAGS.draft, flags.FLAGS.coupling)
    except MissingCalibration as error:
        print(f"confidences are used as they are: {error}", file=sys.stderr)
        return None


def load_text_target():
    """The target of the flags, with a tokenizer.

    Raises:
      ValueError: it has none.
    """
    target = load_target(
        flags.FLAGS.target,
        dtype=DTYPES[flags.FLAGS.dtype],
        keep_quantized=flags.FLAGS.keep_quantized,
    )
    if target.tokenizer is None:
        raise ValueError(
            f"{flags.FLAGS.target} has no tokenizer, which text prompts need"
        )
    return target


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def write_figures(path: str | pathlib.Path, figures: dict) -> None:
    """Writes what a program measured as JSON, making the folder; NaN becomes null."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_without_nan(figures), indent=1) + "\n")


def _without_nan(value):
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
