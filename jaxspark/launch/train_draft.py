"""Trains a drafter for a target on conversations that the target has answered.

  jaxspark train_draft --data=answers.jsonl --out=runs/dspark --steps=3000
  jaxspark train_draft --drafter=dflash --data=... --out=... --steps=3000
  jaxspark train_draft ... --dry_run        what it would do, and its memory

A stopped run (SIGTERM, SIGKILL, power) goes on with the same command, to the bit. The
finished drafter is <out>/drafter, a folder that DeepSpec reads too, or speculators if
its vocabulary is pruned.
"""

import pathlib
import signal
import sys
import zlib
from dataclasses import replace

import jax
import numpy as np
from absl import flags
from flax import nnx
from rich.console import Console
from rich.progress import (
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from jaxspark.checkpoints import (
    draft_format,
    load_draft_checkpoint,
    save_draft_checkpoint,
)
from jaxspark.checkpoints.tree import named_parameters
from jaxspark.configs import drafters as draft_configs
from jaxspark.drafters import DSparkDrafter, Eagle3Drafter
from jaxspark.drafters.heads import HEAD_TYPES
from jaxspark.jsonlines import first_reasons, same_settings
from jaxspark.launch import common, program
from jaxspark.training import initialise, least_squares, objective
from jaxspark.training.data import read_conversations
from jaxspark.training.data.documents import read_documents
from jaxspark.training.data.packing import Batches, draft_vocabulary, pack
from jaxspark.training.features import (
    FeatureCache,
    FeatureSource,
    sequence_bytes,
    target_features,
)
from jaxspark.training.run import has_checkpoint, train
from jaxspark.training.trainer import OPTIMIZERS, TrainConfig, Trainer

OBJECTIVES = {
    "dspark": objective.DSPARK,
    "dflash": objective.DFLASH,
    "eagle3": objective.EAGLE3,
}
DEFAULTS = TrainConfig(steps=1)

common.define_model_flags(draft=None)
flags.DEFINE_list("data", None, "Answered conversations: JSON lines or datasets.")
flags.DEFINE_string("out", None, "Folder of the run.")
flags.DEFINE_enum("drafter", "dspark", list(OBJECTIVES), "Kind of drafter.")
flags.DEFINE_enum("head", "vanilla", HEAD_TYPES, "Sequential head of dspark.")
flags.DEFINE_integer("depth", 2, "Draft layers (eagle3 has one).", lower_bound=1)
flags.DEFINE_integer("block_length", 7, "Tokens per block.", lower_bound=1)
flags.DEFINE_integer("rank", 64, "Rank of the sequential head.", lower_bound=1)
flags.DEFINE_list("taps", None, "Target layers to see; five spread evenly if not set.")
flags.DEFINE_integer(
    "draft_vocab", None, "Size of a pruned draft vocabulary.", lower_bound=1
)
flags.DEFINE_integer("mask_token", 0, "Token that fills a block behind its anchor.")
flags.DEFINE_enum(
    "init",
    None,
    ["least_squares", "target", "random"],
    "How it starts: fitted map by map (if not set, but for eagle3), or draft layers "
    "that are the target's last.",
)
flags.DEFINE_integer(
    "fit_sequences", 480, "Sequences that least squares see.", lower_bound=1
)
flags.DEFINE_string("warm_start", None, "A drafter's folder to start from instead.")
flags.DEFINE_enum("objective", None, list(OBJECTIVES), "Another drafter's objective.")
flags.DEFINE_integer("steps", None, "Optimizer steps.", lower_bound=1)
flags.DEFINE_enum("optimizer", DEFAULTS.optimizer, OPTIMIZERS, "Of matrices.")
flags.DEFINE_float("learning_rate", DEFAULTS.learning_rate, "At its highest.")
flags.DEFINE_float("warmup", DEFAULTS.warmup, "Part of the steps in which it rises.")
flags.DEFINE_float("cooldown", DEFAULTS.cooldown, "Part in which it falls, at the end.")
flags.DEFINE_float("clip", DEFAULTS.clip, "Largest norm of a gradient.")
flags.DEFINE_integer("sequence_length", 512, "Tokens per sequence.", lower_bound=8)
flags.DEFINE_integer("sequences", DEFAULTS.sequences, "Per micro-batch.", lower_bound=1)
flags.DEFINE_integer("accumulate", 1, "Micro-batches per step.", lower_bound=1)
flags.DEFINE_integer("anchors", DEFAULTS.anchors, "Per sequence.", lower_bound=1)
flags.DEFINE_float(
    "feature_noise",
    DEFAULTS.feature_noise,
    "Noise on the taps while training, relative to their size; helps if data are few.",
    lower_bound=0.0,
)
flags.DEFINE_integer("seed", 0, "Of the data's order, anchors and weights.")
flags.DEFINE_enum(
    "features", "cached", ["online", "cached"], "Run the target every time, or once."
)
flags.DEFINE_string("cache_dir", None, "Folder of cached features; <out>/features.")
flags.DEFINE_float("cache_gb", 8.0, "Most that the cache may take.", lower_bound=0.0)
flags.DEFINE_list("cache_layers", None, "Layers to cache, if more than the taps.")
flags.DEFINE_integer("held_out", 8, "Sequences kept for evaluation.", lower_bound=0)
flags.DEFINE_integer("log_every", 10, "Steps between metrics.", lower_bound=1)
flags.DEFINE_integer("save_every", 200, "Steps between checkpoints.", lower_bound=1)
flags.DEFINE_integer("evaluate_every", 200, "Steps between evaluations.", lower_bound=1)
flags.DEFINE_bool("dry_run", False, "Print shapes, memory and steps; train nothing.")
flags.mark_flags_as_required(["data", "out", "steps"])
FLAGS = flags.FLAGS

# What may change when a run goes on: how it is watched, not what it computes.
_FREE = {"out", "features", "cache_dir", "cache_gb", "cache_layers", "dry_run"}
_FREE |= {"log_every", "save_every", "evaluate_every"}


def settings() -> dict:
    """The flags that decide what a run computes."""
    ours = FLAGS.get_flags_for_module(main.__module__)
    names = {flag.name for flag in ours} | {"target", "dtype"}
    return {name: FLAGS[name].value for name in sorted(names - _FREE)}


def layers(name: str) -> tuple[int, ...] | None:
    """The layer numbers of a flag.

    Raises:
      ValueError: they are no numbers.
    """
    chosen = FLAGS[name].value
    try:
        return None if chosen is None else tuple(int(layer) for layer in chosen)
    except ValueError:
        raise ValueError(
            f"--{name} must be layer numbers, got {','.join(chosen)}"
        ) from None


def cached_layers(taps: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """The layers whose outputs are cached.

    Raises:
      ValueError: the target has no such layer, or a tap is not among them.
    """
    chosen = layers("cache_layers") or taps
    missing = sorted(set(taps) - set(chosen))
    if missing:
        raise ValueError(f"--cache_layers={chosen} lacks the taps {missing}")
    for layer in chosen:
        if not -1 <= layer < depth:
            raise ValueError(
                f"--cache_layers={chosen}: the target has layers 0..{depth - 1} (-1: "
                "the embedding)"
            )
    return chosen


def make_drafter(model, packed):
    """The drafter of the flags before its first step."""
    options = {
        "block_size": FLAGS.block_length,
        "draft_vocab_size": FLAGS.draft_vocab,
    }
    if FLAGS.drafter == "eagle3":
        config = draft_configs.eagle3(model.config, **options)
    else:
        options |= {"depth": FLAGS.depth, "mask_token_id": FLAGS.mask_token}
        if FLAGS.drafter == "dspark":
            options |= {"markov_rank": FLAGS.rank, "markov_head_type": FLAGS.head}
        config = getattr(draft_configs, FLAGS.drafter)(model.config, **options)
    if FLAGS.taps:
        config = replace(config, target_layer_ids=layers("taps"))
    draft_format(config)  # What cannot be written shall not be trained.
    kind = Eagle3Drafter if FLAGS.drafter == "eagle3" else DSparkDrafter
    drafter = kind(config, rngs=nnx.Rngs(FLAGS.seed))
    ids = None
    if FLAGS.draft_vocab:
        ids = draft_vocabulary(packed, model.config.vocab_size, FLAGS.draft_vocab)
    other = None
    if FLAGS.warm_start:
        other = load_draft_checkpoint(FLAGS.warm_start, model)
        if ids is not None and other.config.draft_vocab_size == len(ids):
            ids = np.asarray(other.draft_ids[...])
    initialise.use_vocabulary(drafter, model, ids)
    if start() == "target":
        initialise.from_target(drafter, model)
    left = [] if other is None else initialise.from_drafter(drafter, other)
    return drafter, left


def start() -> str:
    """How the drafter of the flags starts; a warm start then replaces what it has.

    Raises:
      ValueError: it cannot.
    """
    fitted = FLAGS.drafter != "eagle3" and not FLAGS.warm_start
    if FLAGS.init == "least_squares" and not fitted:
        raise ValueError(
            "--init=least_squares is for dspark and dflash without --warm_start"
        )
    return FLAGS.init or ("least_squares" if fitted else "target")


def fit(console: Console, drafter, model, batches: Batches, source) -> None:
    """Starts a drafter by least squares on the first batches."""
    count = min(FLAGS.fit_sequences / batches.size, batches.per_epoch)
    samples = [batches[index] for index in range(max(1, int(count)))]
    with console.status("fitting") as status:
        least_squares.fit(
            drafter,
            model,
            samples,
            source,
            block_length=FLAGS.block_length,
            anchors=FLAGS.anchors,
            seed=FLAGS.seed,
            on_stage=lambda stage: status.update(f"fitting {stage}"),
        )


def describe(console: Console, trainer, state, batches, source, packed) -> None:
    """What a run would do, in tables."""
    config = trainer.config
    table = Table(title="parameters")
    for column in ("name", "shape", "", "numbers"):
        table.add_column(column, justify="right" if column == "numbers" else "left")
    counts = {"trained": 0, "frozen": 0}
    for kind, tree in (("trained", state.trained), ("frozen", trainer.frozen)):
        for path, leaf in nnx.to_flat_state(tree):
            name = ".".join(map(str, path))
            table.add_row(name, str(leaf.shape), kind, f"{leaf.size:,}")
            counts[kind] += leaf.size
    console.print(table)
    lowered = target_features.lower(trainer.target, batches[0], taps=source.taps)
    features, seen = lowered.out_info, lowered.compile().memory_analysis()
    step = trainer.lower(state, batches[0], features).compile().memory_analysis()
    target = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(trainer.target))
    tokens = int((packed.documents_PS >= 0).sum())
    count, length = packed.ids_PS.shape
    cached = 0.0
    if FLAGS.features == "cached":
        kept = cached_layers(source.taps, trainer.target.config.num_hidden_layers)
        cached = count * sequence_bytes(trainer.target, length, kept)
        cached = min(cached, FLAGS.cache_gb * 1e9)
    figures = {
        "trained parameters": f"{counts['trained']:,}",
        "frozen parameters": f"{counts['frozen']:,}",
        "target": common.size(target),
        "parameters, gradients and optimizer": common.size(
            sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + 4 * counts["trained"]
        ),
        "activations of a micro-batch": common.size(step.temp_size_in_bytes),
        "activations of the target": common.size(seen.temp_size_in_bytes),
        "features of a micro-batch": common.size(
            sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(features))
        ),
        "cache": common.size(cached),
        "sequences": f"{count:,} of {length} tokens",
        "tokens": f"{tokens:,} ({packed.trainable_PS.sum():,} of answers)",
        "steps": f"{config.steps:,}, {batches.per_epoch / config.accumulate:.1f} "
        "per epoch",
        "rows per step": f"{config.accumulate * config.sequences * config.anchors:,} "
        f"blocks of {config.block_length}",
    }
    table = Table(title="run", show_header=False)
    for name, value in figures.items():
        table.add_row(name, value)
    console.print(table)


def main() -> int:
    """Trains what is left to train, then writes the drafter; 143 if it was stopped."""
    console = Console()
    out = pathlib.Path(FLAGS.out)
    target = common.load_text_target()
    with console.status("reading and packing"):
        documents, cut, dropped = read_documents(
            target.tokenizer,
            read_conversations(FLAGS.data),
            max_tokens=FLAGS.sequence_length,
            vocab_size=target.model.config.vocab_size,
        )
        packed = pack(documents, FLAGS.sequence_length)
    if cut:
        console.print(f"{cut} documents were cut to {FLAGS.sequence_length} tokens")
    if dropped:
        count = f"{len(dropped)} of {len(dropped) + len(documents)} lines dropped"
        print(f"{count}: {first_reasons(dropped)}", file=sys.stderr)
    if 0 < FLAGS.held_out < FLAGS.sequences:
        raise ValueError(
            f"--held_out={FLAGS.held_out} is less than a batch of "
            f"--sequences={FLAGS.sequences}; 0 evaluates nothing"
        )
    train_count = len(packed.index_P) - FLAGS.held_out
    if train_count < FLAGS.sequences:
        raise ValueError(
            f"{train_count} sequences to train on, a micro-batch has {FLAGS.sequences}"
        )
    held_out = packed[np.arange(FLAGS.held_out)] if FLAGS.held_out else None
    batches = Batches(
        packed[np.arange(FLAGS.held_out, len(packed.index_P))],
        FLAGS.sequences,
        FLAGS.seed,
    )
    drafter, left = make_drafter(target.model, batches.packed)
    if left:
        console.print(f"not in {FLAGS.warm_start}: {', '.join(left)}")
    config = TrainConfig(
        objective=OBJECTIVES[FLAGS.objective or FLAGS.drafter],
        **{
            name: FLAGS[name].value
            for name in TrainConfig.__dataclass_fields__
            if name != "objective"
        },
    )
    taps = drafter.config.target_layer_ids
    if FLAGS.dry_run:
        trainer, state = Trainer.create(drafter, target.model, config)
        source = FeatureSource(target.model, taps)
        describe(console, trainer, state, batches, source, packed)
        return 0
    kept = cached_layers(taps, target.model.config.num_hidden_layers)
    packing = zlib.crc32(packed.ids_PS, zlib.crc32(packed.documents_PS))
    same_settings(out / "run.json", settings() | {"packing": packing})
    cache = None
    if FLAGS.features == "cached":
        cache = FeatureCache(
            FLAGS.cache_dir or out / "features",
            target.model,
            packed,
            layers=kept,
            limit_bytes=int(FLAGS.cache_gb * 1e9),
        )
    source = FeatureSource(target.model, taps, cache)
    # A run that goes on has its parameters from a checkpoint.
    if start() == "least_squares" and not has_checkpoint(out):
        fit(console, drafter, target.model, batches, source)
    trainer, state = Trainer.create(drafter, target.model, config)
    columns = (
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training", total=config.steps)

        def show(line):
            text = None
            if "loss" in line:
                agree = " ".join(f"{rate:.2f}" for rate in line["agree"])
                text = (
                    f"loss {line['loss']:.3f} · accepted length "
                    f"{line['accepted_length']:.2f} · agree {agree}"
                )
            progress.update(bar, completed=line["step"], description=text)
            if "held_out" in line and not console.is_terminal:
                figures = line["held_out"]
                console.print(
                    f"step {line['step']}: held-out loss {figures['loss']:.3f}, "
                    f"accepted length {figures['accepted_length']:.3f}"
                )

        state, finished = train(
            trainer,
            state,
            batches,
            source,
            out,
            held_out=held_out,
            log_every=FLAGS.log_every,
            save_every=FLAGS.save_every,
            evaluate_every=FLAGS.evaluate_every,
            on_metrics=show,
        )
    trained = trainer.drafter(state)
    save_draft_checkpoint(
        out / "drafter",
        trained,
        target.model,
        target_name=target.name,
        overwrite=True,
    )
    size = sum(array.nbytes for array in named_parameters(trained).values())
    console.print(
        f"step {int(state.step)}: {out / 'drafter'} ({common.size(size)})"
        + ("" if finished else "; stopped, run the same command to go on")
    )
    return 0 if finished else 128 + signal.SIGTERM


if __name__ == "__main__":
    program.run(main)
