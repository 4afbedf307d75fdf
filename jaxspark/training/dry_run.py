"""Dry runs: parameters, memory and steps of a training run before it starts."""

from collections.abc import Sequence

import jax
from flax import nnx
from rich.console import Console
from rich.table import Table

from jaxspark.training.data.packing import Batches, Packed
from jaxspark.training.feature_cache import sequence_bytes
from jaxspark.training.features import FeatureSource, lower_features
from jaxspark.training.trainer import Trainer, TrainState


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _temporary(compiled: jax.stages.Compiled) -> str:
    """Size of a program's temporaries, if its compiler reports it."""
    analysis = compiled.memory_analysis()
    return size(analysis.temp_size_in_bytes) if analysis else "unknown"


def describe(
    console: Console,
    trainer: Trainer,
    state: TrainState,
    batches: Batches,
    source: FeatureSource,
    packed: Packed,
    cached: Sequence[int],
    cache_bytes: float,
) -> None:
    """What a run would do, in tables.

    Args:
      console: where they are printed.
      trainer: what would take the steps.
      state: before the first one.
      batches: what is trained on.
      source: features of any batch.
      packed: all sequences, held-out ones included.
      cached: layers whose outputs would be cached.
      cache_bytes: most that the cache may take.
    """
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
    lowered = lower_features(trainer.target, batches[0], taps=source.taps)
    features, seen = lowered.out_info, lowered.compile()
    step = trainer.lower(state, batches[0], features).compile()
    target = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(trainer.target))
    tokens = int((packed.documents_PS >= 0).sum())
    count, length = packed.ids_PS.shape
    kept = count * sequence_bytes(trainer.target, length, cached) if cached else 0
    figures = {
        "trained parameters": f"{counts['trained']:,}",
        "frozen parameters": f"{counts['frozen']:,}",
        "target": size(target),
        "parameters, gradients and optimizer": size(
            sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + 4 * counts["trained"]
        ),
        "activations of a micro-batch": _temporary(step),
        "activations of the target": _temporary(seen),
        "features of a micro-batch": size(
            sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(features))
        ),
        "cache": size(min(kept, cache_bytes)),
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
