r"""Converts checkpoints: targets to Hugging Face folders, drafters between formats.

  jaxspark convert --target=model.gguf --out=model-safetensors
  jaxspark convert --target=Qwen/Qwen3-4B --out=drafter --dtype=bfloat16 \
      --draft=deepseek-ai/dspark_qwen3_4b_block7
  jaxspark convert --target=meta-llama/Llama-3.1-8B-Instruct --out=drafter \
      --draft=runs/dspark/drafter --format=speculators
  jaxspark convert --draft=runs/dspark/drafter --out=small --dtype=bfloat16 \
      --compact                                       without the target's head rows

Written under a temporary name and renamed when complete, with a SHA256SUMS file that is
checked when the folder is loaded.
"""

import pathlib
from dataclasses import dataclass
from typing import Any

from jaxspark import load_target
from jaxspark.checkpoints import (
    FORMATS,
    load_draft_checkpoint,
    save_draft_checkpoint,
    save_target,
)
from jaxspark.configuration import option
from jaxspark.launch import common, program


@dataclass(frozen=True, kw_only=True)
class Config(common.ModelOptions):
    """What to convert to what."""

    draft: str | None = option(
        "Drafter to convert: a DeepSpec or speculators folder or Hub id made for "
        "--target.",
        None,
    )
    format: str | None = option(
        "Format of the drafter's folder; deepspec if not set, or speculators for what "
        "DeepSpec cannot read.",
        None,
        choices=FORMATS,
    )
    out: str = option("Folder to write.")
    compact: bool = option(
        "Leave out of a drafter what is the target's, for jaxspark alone.", False
    )
    overwrite: bool = option("Replace a folder that is not empty.", False)

    def __post_init__(self):
        super().__post_init__()
        if self.compact and self.draft is None:
            raise ValueError("--compact needs --draft: it is about drafters")
        if self.format and (self.draft is None or self.compact):
            raise ValueError("--format is about drafters that are not --compact")


def main(config: Config) -> None:
    """Reads one format, writes the other."""
    target = load_target(config.target, dtype=common.DTYPES[config.dtype])
    model: Any = target.model
    out = pathlib.Path(config.out)
    if config.draft is None:
        save_target(out, target, overwrite=config.overwrite)
    else:
        drafter = load_draft_checkpoint(config.draft, model, dtype=model.dtype)
        save_draft_checkpoint(
            out,
            drafter,
            None if config.compact else model,
            target_name=target.name,
            format=config.format,
            overwrite=config.overwrite,
            pruned_head=not config.compact,
        )
    files = [path for path in out.iterdir() if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"wrote {out} ({len(files)} files, {size / 1e6:.1f} MB)")


if __name__ == "__main__":
    program.run(main, Config)
