"""Rounds that are recorded once and reused from files."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from jaxspark.calibration.rounds import Rounds, record_rounds
from jaxspark.decoding.couplings import Coupling
from jaxspark.progress import bars


def kept_rounds(
    console: Console,
    folder: Path,
    part: str,
    target,
    drafter,
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float,
    coupling: Coupling,
    **options,
) -> Rounds:
    """The rounds of some prompts: from a file of an earlier run, or recorded now.

    Args:
      console: where a bar is shown.
      folder: of the files.
      part: what the prompts are for: "fit", "test".
      target: a loaded target.
      drafter: its confidences are recorded.
      prompts: token ids.
      temperature: of sampling.
      coupling: "rejection" or "gumbel".
      **options: further ones of `record_rounds`.
    """
    # Greedy rounds are the same under every coupling.
    kind = f"{coupling}_{temperature:g}" if temperature else "greedy"
    path = folder / f"{part}_{kind}.npz"
    if path.exists():
        return Rounds.load(path)
    with bars(console) as progress:
        title = f"{part}, temperature {temperature:g}"
        task = progress.add_task(title, total=len(prompts))
        rounds = record_rounds(
            target,
            drafter,
            prompts,
            temperature=temperature,
            coupling=coupling,
            on_group=lambda count: progress.update(task, completed=count),
            **options,
        )
    rounds.save(path)
    return rounds
