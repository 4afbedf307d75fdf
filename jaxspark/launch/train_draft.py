"""Trains a drafter for a target on conversations that the target has answered.

  jaxspark train_draft --data=answers.jsonl --out=runs/dspark --steps=3000
  jaxspark train_draft --drafter=dflash --data=... --out=... --steps=3000
  jaxspark train_draft ... --dry_run        what it would do, and its memory

On a mesh the sequences of a batch are shared out over data x expert, also over several
hosts (--mesh, --distributed), which share the folder --out.

A stopped run (SIGTERM, SIGKILL, power) goes on with the same command, to the bit. The
finished drafter is <out>/drafter, a folder that DeepSpec reads too, or speculators if
its vocabulary is pruned.
"""

import pathlib
import signal
import zlib
from dataclasses import dataclass, fields
from typing import Any

import jax

from jaxspark.checkpoints import save_draft_checkpoint
from jaxspark.checkpoints.tree import named_parameters
from jaxspark.configuration import option
from jaxspark.jsonlines import check_settings
from jaxspark.launch import common, program
from jaxspark.launch.devices import DeviceOptions
from jaxspark.models import TargetDecoder
from jaxspark.parallel.agreement import in_turn, leads
from jaxspark.training import drafter_setup
from jaxspark.training.config import Recipe, TrainConfig
from jaxspark.training.data.dataset import DataOptions, read_packed, split
from jaxspark.training.drafter_setup import OBJECTIVES, DrafterOptions
from jaxspark.training.dry_run import describe, size
from jaxspark.training.feature_options import FeatureOptions
from jaxspark.training.features import FeatureSource
from jaxspark.training.progress_bar import watched
from jaxspark.training.run import has_checkpoint, train
from jaxspark.training.trainer import Trainer

# What may change when a run goes on: where it runs and how it is watched.
_FREE = {"out", "features", "cache_dir", "cache_gb", "cache_layers", "dry_run"}
_FREE |= {"log_every", "save_every", "evaluate_every", "keep_quantized"}
_FREE |= {each.name for each in fields(DeviceOptions)}


@dataclass(frozen=True, kw_only=True)
class Config(common.TargetOptions, DrafterOptions, Recipe, DataOptions, FeatureOptions):
    """What to train, on what, and how it is watched."""

    out: str = option("Folder of the run.")
    objective: str | None = option(
        "Another drafter's objective.", None, choices=tuple(OBJECTIVES)
    )
    log_every: int = option("Steps between metrics.", 10, at_least=1)
    save_every: int = option("Steps between checkpoints.", 200, at_least=1)
    evaluate_every: int = option("Steps between evaluations.", 200, at_least=1)
    dry_run: bool = option("Print shapes, memory and steps; train nothing.", False)

    def settings(self) -> dict:
        """The options that decide what a run computes."""
        return self.recorded(sorted({each.name for each in fields(self)} - _FREE))

    def train_config(self) -> TrainConfig:
        """The recipe for the chosen drafter."""
        return TrainConfig(
            objective=OBJECTIVES[self.objective or self.drafter],
            block_length=self.block_length,
            dtype=self.dtype,
            **{each.name: getattr(self, each.name) for each in fields(Recipe)},
        )


def main(config: Config) -> int:
    """Trains what is left to train, then writes the drafter; 143 if it was stopped."""
    console = common.console()
    out = pathlib.Path(config.out)
    target, tokenizer = config.load()
    model = target.model
    assert isinstance(model, TargetDecoder)
    packed = read_packed(console, config, tokenizer, model.config.vocab_size)
    batches, held_out = split(
        packed,
        held_out=config.held_out,
        sequences=config.sequences,
        seed=config.seed,
    )
    drafter, left = drafter_setup.new_drafter(
        config, model, batches.packed, seed=config.seed
    )
    if left:
        console.print(f"not in {config.warm_start}: {', '.join(left)}")
    taps = drafter.config.target_layer_ids
    layers = config.cached_layers(taps, model.config.num_hidden_layers)
    if config.dry_run:
        trainer, state = Trainer.create(drafter, model, config.train_config())
        source, limit = FeatureSource(model, taps), config.cache_gb * 1e9
        describe(console, trainer, state, batches, source, packed, layers, limit)
        return 0
    packing = zlib.crc32(packed.ids_PS, zlib.crc32(packed.documents_PS))
    begin(out, config.settings() | {"packing": packing})
    source = config.source(model, taps, packed, layers, out / "features")
    # A run that goes on has its parameters from a checkpoint.
    if config.start == "least_squares" and not has_checkpoint(out):
        with console.status("fitting") as status:
            drafter_setup.fit(
                config,
                drafter,
                model,
                batches,
                source,
                anchors=config.anchors,
                seed=config.seed,
                on_stage=lambda stage: status.update(f"fitting {stage}"),
            )
    trainer, state = Trainer.create(drafter, model, config.train_config())
    with watched(console, config.steps) as show:
        state, finished = train(
            trainer,
            state,
            batches,
            source,
            out,
            held_out=held_out,
            log_every=config.log_every,
            save_every=config.save_every,
            evaluate_every=config.evaluate_every,
            on_metrics=show,
        )
    trained = trainer.drafter(state)
    save_draft_checkpoint(
        out / "drafter", trained, model, target_name=target.name, overwrite=True
    )
    weight = sum(array.nbytes for array in named_parameters(trained).values())
    console.print(
        f"step {int(state.step)}: {out / 'drafter'} ({size(weight)})"
        + ("" if finished else "; stopped, run the same command to go on")
    )
    return 0 if finished else 128 + signal.SIGTERM


def begin(out: pathlib.Path, settings: dict[str, Any]) -> None:
    """Keeps the settings of a run in its folder, or compares them with those there.

    Raises:
      ValueError: they have changed, or differ between the processes of a job, or these
        do not share the folder.
    """

    def check():
        if not (leads() or (out / "run.json").exists()):
            raise ValueError(
                f"--out={out}: process {jax.process_index()} does not see what process "
                "0 wrote; choose a folder of a file system that all hosts share"
            )
        check_settings(out / "run.json", settings)

    in_turn(check)


if __name__ == "__main__":
    program.run(main, Config)
