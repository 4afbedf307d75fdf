"""A training run in a folder: checkpoints, metrics, and going on where it stopped.

    <folder>/checkpoints    Orbax; the newest two
    <folder>/metrics.jsonl  one line per logged step
    <folder>/run.json       the settings, which must not change

A run that was killed goes on from its newest checkpoint and repeats the steps after it
to the bit: batches and anchors are functions of the seed and the step number.

Several processes of a job write one folder: their own shards of checkpoints, and
process 0 all else. They stop together, whichever of them SIGTERM comes to.
"""

import contextlib
import signal
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxspark.jsonlines import JsonLines
from jaxspark.parallel.agreement import agreed, anywhere, in_turn, leads
from jaxspark.settings import standard_settings
from jaxspark.training.data.packing import Batches, Packed
from jaxspark.training.features import FeatureSource, with_features
from jaxspark.training.objective import summary
from jaxspark.training.trainer import Trainer, TrainState

# Steps that several processes are ahead of what they know of each other.
_AHEAD = 2


class Checkpoints:
    """Orbax checkpoints of a `TrainState`."""

    def __init__(self, folder: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, state: TrainState) -> None:
        """Begins to write a checkpoint, unless there is one of this step.

        Waits for the one before. An unfinished one is never taken for whole.
        """
        step = int(state.step)
        if step != self.manager.latest_step():
            self.manager.save(step, args=ocp.args.StandardSave(_plain(state)))

    def restore(self, state: TrainState) -> TrainState:
        """The newest checkpoint in the form of `state`, or `state` itself.

        Raises:
          ValueError: the checkpoint is damaged or of another drafter.
        """
        step = agreed(self.manager.latest_step() or 0)
        if not step:
            return state
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(state))
        try:
            plain = self.manager.restore(step, args=ocp.args.StandardRestore(shapes))
        except Exception as error:  # Orbax and its stores raise many kinds.
            raise ValueError(
                f"{self.manager.directory}/{step}: cannot be restored ({error}); "
                "remove that folder to go on from the one before"
            ) from error
        leaves = jax.tree.leaves(plain)
        return jax.tree.unflatten(jax.tree.structure(state), leaves)

    def close(self) -> None:
        """Waits for what is being written."""
        self.manager.close()


def has_checkpoint(folder: Path) -> bool:
    """Whether a run in this folder would go on from somewhere."""
    steps = (folder / "checkpoints").glob("*")
    return bool(agreed(any(path.name.isdecimal() for path in steps)))


def _plain(state: TrainState) -> dict[str, Any]:
    """The state's arrays by number: independent of the classes that hold them."""
    return {f"{i:04}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Turns SIGTERM into a question, asked after every step: is it the last?

    The processes of a job are told alike, `_AHEAD` steps after it came to any.
    """
    seen: list[int] = []
    asked: deque[jax.Array] = deque()

    def stopping() -> bool:
        if jax.process_count() == 1:
            return bool(seen)
        # What was asked some steps ago is known by now, so devices go on meanwhile.
        asked.append(anywhere(bool(seen)))
        return len(asked) > _AHEAD and bool(asked.popleft())

    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGTERM, before)


@standard_settings()
def train(
    trainer: Trainer,
    state: TrainState,
    batches: Batches,
    source: FeatureSource,
    folder: Path,
    *,
    held_out: Packed | None = None,
    log_every: int = 10,
    save_every: int = 200,
    evaluate_every: int = 200,
    on_metrics: Callable[[dict[str, Any]], None] = lambda metrics: None,
) -> tuple[TrainState, bool]:
    """Takes the steps that are left.

    Args:
      trainer: what takes them.
      state: before the first step; the newest checkpoint replaces it.
      batches: packed sequences by micro-batch, the same on all processes, of which
        each feeds those of its own shards.
      source: features of any batch.
      folder: of the run.
      held_out: sequences that are only evaluated.
      log_every: steps between lines of metrics, each about its own step alone.
      save_every: steps between checkpoints.
      evaluate_every: steps between evaluations.
      on_metrics: called with every line, and for steps without one with {"step": n}.

    Returns:
      The state, and whether all steps are done (False: SIGTERM came, all is saved).

    Raises:
      ValueError: fewer held-out sequences than a batch; or a step gave a loss or
        parameters that are no numbers, and the checkpoints before it stay.
    """
    config = trainer.config
    if held_out is not None and len(held_out.index_P) < config.sequences:
        raise ValueError(
            f"{len(held_out.index_P)} held-out sequences, a batch needs "
            f"{config.sequences}"
        )
    checkpoints = Checkpoints(folder / "checkpoints")
    state = checkpoints.restore(state)
    begin = int(state.step)
    path = folder / "metrics.jsonl"
    metrics = in_turn(lambda: JsonLines(path, writes=leads()))
    metrics.keep(lambda line: line["step"] <= begin)
    count = config.accumulate
    clock, timed = perf_counter(), begin
    with stop_signal() as stopping:
        for step in range(begin, config.steps):
            micro = [batches[step * count + i] for i in range(count)]
            state, sums = trainer.step(state, [with_features(b, source) for b in micro])
            done, stop = step + 1, stopping()
            line: dict[str, Any] = {"step": done}
            if done % log_every == 0 or done == config.steps:
                figures = summary(jax.device_get(sums), config.objective)
                _check(np.isfinite(figures["loss"]), f"the loss of step {done}")
                # Steps are queued: what is known is the time since one was waited for.
                seconds = (perf_counter() - clock) / (done - timed)
                line |= figures | {"seconds_per_step": seconds}
            if held_out is not None and done % evaluate_every == 0:
                line["held_out"] = evaluate(trainer, state, held_out, source)
            if len(line) > 1:
                metrics.add(line)
                clock, timed = perf_counter(), done
            on_metrics(line)
            if done % save_every == 0 or done == config.steps or stop:
                finite = _all_finite(state.trained)
                _check(finite, f"a parameter after step {done}")
                checkpoints.save(state)
            if stop:
                break
    checkpoints.close()
    return state, int(state.step) == config.steps


def _check(finite, what: str) -> None:
    if not finite:
        raise ValueError(
            f"{what} is no finite number; the checkpoints before it are whole. Lower "
            "learning_rate?"
        )


@jax.jit
def _all_finite(tree) -> jax.Array:
    return jnp.all(jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]))


@standard_settings()
def evaluate(
    trainer: Trainer, state: TrainState, packed: Packed, source: FeatureSource
) -> dict[str, Any]:
    """Figures over all of `packed`; the last incomplete batch is left out."""
    size = trainer.config.sequences
    total = None
    for begin in range(0, len(packed.index_P) - size + 1, size):
        batch = packed[np.arange(begin, begin + size)]
        sums = trainer.evaluate(state, *with_features(batch, source))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    return summary(jax.device_get(total), trainer.config.objective)
