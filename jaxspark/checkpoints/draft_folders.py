"""Folders of drafters: their format is told apart when read, chosen when written."""

import warnings
from pathlib import Path
from typing import Any

import jax

from jaxspark.checkpoints import deepspec, folders, hub, speculators
from jaxspark.checkpoints.deepseek_v4_folder import SHARD_BYTES
from jaxspark.checkpoints.draft_tensors import (
    DraftConfig,
    DraftModel,
    check_fits,
    check_taps,
    drafter_from_tensors,
    tensors_from_drafter,
)
from jaxspark.checkpoints.fields import read_json, write_json
from jaxspark.checkpoints.safetensors_files import open_safetensors, write_safetensors
from jaxspark.drafters import Eagle3Config
from jaxspark.errors import CheckpointError
from jaxspark.models import TargetConfig, TargetDecoder
from jaxspark.parallel.agreement import by_first
from jaxspark.parallel.mesh import read

FORMATS = ("deepspec", "speculators")


def read_drafter(
    folder: Path, target: TargetConfig | TargetDecoder, *, dtype: Any
) -> DraftModel:
    """The drafter in a local folder; see `load_draft_checkpoint`."""
    where = str(folder / "config.json")
    raw = read_json(folder / "config.json")
    model = target if isinstance(target, TargetDecoder) else None
    theirs = target.config if isinstance(target, TargetDecoder) else target
    config: DraftConfig
    if speculators.KIND in raw:
        config = speculators.draft_config_from_speculators(raw, theirs, where=where)
    else:
        config = deepspec.draft_config_from_deepspec(raw, where=where)
    check_fits(config, theirs, where=where)
    check_taps(config, where=where)
    return drafter_from_tensors(
        config, theirs, open_safetensors(folder), dtype=dtype, model=model
    )


def draft_format(config: DraftConfig, wanted: str | None = None) -> str:
    """The format in which other programs can read a drafter.

    Args:
      config: the drafter's.
      wanted: "deepspec" or "speculators"; None for the first that can say it.

    Raises:
      CheckpointError: it cannot be said, and why.
    """
    if wanted not in (None, *FORMATS):
        raise CheckpointError(f"format is {wanted!r}, expected one of {FORMATS}")
    check_taps(config, where="the drafter")
    reasons = []
    for name in FORMATS if wanted is None else (wanted,):
        reason = (
            deepspec.why_not_deepspec(config, complete=True)
            if name == "deepspec"
            else speculators.why_not_speculators(config)
        )
        if reason is None:
            return name
        reasons.append(reason)
    raise CheckpointError("; ".join(reasons))


def save_draft_checkpoint(
    folder: str | Path,
    drafter: DraftModel,
    target_model: TargetDecoder | None = None,
    *,
    target_name: str | None = None,
    format: str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    pruned_head: bool = True,
) -> None:
    """Writes a drafter with checksums, whole or not at all.

    All processes of a job call this, and process 0 writes.

    Args:
      folder: where; must be new or empty unless `overwrite`.
      drafter: what to write.
      target_model: also writes copies of its embedding and LM head, without which
        other programs cannot use the folder. None: a small folder for jaxspark alone,
        in DeepSpec's layout.
      target_name: the target's Hub id or folder, which speculators' folders name; its
        loader of Eagle3 drafters demands one.
      format: "deepspec" or "speculators"; by default DeepSpec's, and speculators' for
        what DeepSpec cannot read (see `draft_format`).
      overwrite: whether to replace a checkpoint that is there.
      shard_bytes: weights are split into files of at most this size.
      pruned_head: False leaves out the rows of a pruned head, which are the target's
        and are taken from it at loading; for jaxspark alone.

    Raises:
      CheckpointError: the folder is taken, the format cannot say this drafter or lacks
        `target_model`, or the drafter does not fit it.
    """
    config = drafter.config
    complete = target_model is not None and pruned_head
    check_taps(config, where=str(folder))
    if target_model is not None:
        check_fits(config, target_model.config, where=str(folder))
    if complete:
        format = draft_format(config, format)
    elif format == "speculators":
        raise CheckpointError(
            f"{folder}: speculators wants the target's matrices: give target_model, "
            "and the pruned head"
        )
    elif reason := deepspec.why_not_deepspec(config, complete=False):
        raise CheckpointError(f"{folder}: {reason}")
    written: dict[str, Any]
    if format == "speculators" and target_model is not None:
        written = speculators.draft_config_to_speculators(
            config,
            target_model.config,
            dtype=drafter.dtype,
            verifier=_verifier(config, target_name, where=str(folder)),
        )
    else:
        written = deepspec.draft_config_to_deepspec(
            config, dtype=drafter.dtype, complete=complete
        )
    arrays = tensors_from_drafter(drafter, target_model, pruned_head=pruned_head)
    if jax.process_count() > 1:
        arrays = {name: read(array) for name, array in arrays.items()}

    def write():
        with folders.new_folder(Path(folder), overwrite=overwrite) as new:
            write_json(new / "config.json", written)
            write_safetensors(new, arrays.items(), shard_bytes=shard_bytes)

    by_first(write)


def _verifier(config: DraftConfig, name: str | None, *, where: str) -> str | None:
    """The target's Hub id or absolute path, if it has one."""
    if name is not None and Path(name).is_dir():
        return str(Path(name).resolve())
    if name is not None and hub.is_hub_id(name):
        return name
    if isinstance(config, Eagle3Config):
        warnings.warn(
            f"{where}: speculators loads an Eagle3 drafter with its target's "
            f"configuration only, and target_name {name!r} is no Hub id or folder; put "
            "one into config.json: speculators_config.verifier.name_or_path",
            stacklevel=3,
        )
    return None
