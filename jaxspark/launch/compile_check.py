"""Says whether a model fits a TPU slice or GPU node before you book it.

  jaxspark compile_check --config=deepseek_v4_flash --topology=v5p:4x4x4 \
      --mesh=data:4,expert:16 --slots=64 --capacity=131072
  jaxspark compile_check --topology=h100:8 --mesh=expert:8 --quantized --slots=8
  jaxspark compile_check --topology=v5p:4x4x4 --mesh=data:4,expert:16 --what=prefill
  jaxspark compile_check --topology=v5p:4x4x4 --mesh=data:4,expert:16 --what=train \
      --slots=64 --capacity=4096

Compiles the very program that would run there, with the chip's own compiler, on any
machine; nothing is allocated. Prints what each chip holds against its memory, what a
round moves and computes, the collectives, and the time that no round can be below,
with what bounds it. Exits 1 if it does not fit. Takes minutes for a large model.
"""

from dataclasses import dataclass

import jax
from absl import logging

from jaxspark.configuration import Configuration, option
from jaxspark.figures import write_figures
from jaxspark.launch import common, program
from jaxspark.launch.describe import PRESETS
from jaxspark.simulation.abstract_models import abstract_models
from jaxspark.simulation.chips import parse_slice
from jaxspark.simulation.compile_check import compile_program
from jaxspark.simulation.compile_report import figures, report
from jaxspark.simulation.programs import (
    WHAT,
    lower_decoding,
    lower_draft_training,
    lower_training,
)


@dataclass(frozen=True, kw_only=True)
class Config(Configuration):
    """What to compile, and for what."""

    config: str = option("Architecture.", "deepseek_v4_flash", choices=sorted(PRESETS))
    topology: str = option(
        "Slice or node: v5e, v5p, v6e or tpu7x and a topology (v5p:4x4x4), or h100 and "
        "how many (h100:8)."
    )
    mesh: str = option(
        "Shards along data, expert and model, such as data:4,expert:16; as many as "
        "there are devices (a tpu7x chip has two)."
    )
    what: str = option(
        "The program: a round of decoding, a chunk of prefill, or a step of "
        "DeepSeek-V4's own training.",
        "decode",
        choices=WHAT,
    )
    slots: int = option(
        "Requests decoded together, or texts of a training step, on all chips.",
        64,
        at_least=1,
    )
    capacity: int = option(
        "Cache positions of each request, or tokens of a text.", 131072, at_least=1
    )
    block_length: int = option("Drafts per round.", 5, at_least=1)
    dtype: str = option(
        "Type of weights and caches.", "bfloat16", choices=tuple(common.DTYPES)
    )
    quantized: bool = option(
        "Leave DeepSeek-V4's matrices in the FP8 and FP4 they are released in.", False
    )
    program_out: str | None = option("File for the compiled program's text.", None)
    json_out: str | None = common.json_option()


def main(config: Config) -> int:
    """Compiles and reports; 1 if it does not fit."""
    # Only compilers are wanted, whatever this machine has.
    jax.config.update("jax_platforms", "cpu")
    # Kernels say of every product that it was not tuned on the chip.
    logging.set_verbosity(logging.ERROR)
    console = common.console()
    onto = parse_slice(config.topology)
    mesh = onto.mesh(config.mesh)
    architecture = PRESETS[config.config]()
    with jax.set_mesh(mesh):
        target, drafter = abstract_models(
            architecture,
            dtype=common.DTYPES[config.dtype],
            quantized=config.quantized,
            block_length=config.block_length,
        )
    size = {"slots": config.slots, "capacity": config.capacity}
    with console.status(f"compiling {config.what} for {config.topology}"):
        with jax.set_mesh(mesh):
            if config.what == "train":
                lowered = lower_training(
                    mesh, target, texts=config.slots, length=config.capacity
                )
            elif config.what == "train_draft":
                lowered = lower_draft_training(
                    mesh,
                    target,
                    sequences=config.slots,
                    length=config.capacity,
                    block_length=config.block_length,
                )
            else:
                lowered = lower_decoding(
                    config.what,
                    mesh,
                    target,
                    drafter,
                    block_length=config.block_length,
                    **size,
                )
        compiled = compile_program(
            lowered,
            onto,
            mesh,
            experts=getattr(architecture, "n_routed_experts", 0),
            **size,
        )
    report(console, config.config, config.what, compiled)
    if config.program_out and compiled.text:
        with open(config.program_out, "w") as file:
            file.write(compiled.text)
    if config.json_out:
        write_figures(config.json_out, figures(config.config, config.what, compiled))
    return int(compiled.free < 0)


if __name__ == "__main__":
    program.run(main, Config)
