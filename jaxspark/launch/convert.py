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

from absl import flags

from jaxspark import load_target
from jaxspark.checkpoints import (
    FORMATS,
    load_draft_checkpoint,
    save_draft_checkpoint,
    save_target,
)
from jaxspark.launch import common, program

common.define_model_flags(draft=None, keep_quantized=False)
flags.DEFINE_string(
    "draft",
    None,
    "Drafter to convert: a DeepSpec or speculators folder or Hub id made for --target.",
)
flags.DEFINE_enum(
    "format",
    None,
    FORMATS,
    "Of the drafter's folder; deepspec if not set, or speculators for what DeepSpec "
    "cannot read.",
)
flags.DEFINE_string("out", None, "Folder to write.", required=True)
flags.DEFINE_bool(
    "compact", False, "Leave out of a drafter what is the target's, for jaxspark alone."
)
flags.DEFINE_bool("overwrite", False, "Replace a folder that is not empty.")
FLAGS = flags.FLAGS


def main() -> None:
    """Reads one format, writes the other."""
    target = load_target(FLAGS.target, dtype=common.DTYPES[FLAGS.dtype])
    out = pathlib.Path(FLAGS.out)
    if FLAGS.compact and FLAGS.draft is None:
        raise ValueError("--compact needs --draft: it is about drafters")
    if FLAGS.format and (FLAGS.draft is None or FLAGS.compact):
        raise ValueError("--format is about drafters that are not --compact")
    if FLAGS.draft is None:
        save_target(out, target, overwrite=FLAGS.overwrite)
    else:
        drafter = load_draft_checkpoint(
            FLAGS.draft, target.model, dtype=target.model.dtype
        )
        save_draft_checkpoint(
            out,
            drafter,
            None if FLAGS.compact else target.model,
            target_name=target.name,
            format=FLAGS.format,
            overwrite=FLAGS.overwrite,
            pruned_head=not FLAGS.compact,
        )
    files = [path for path in out.iterdir() if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"wrote {out} ({len(files)} files, {size / 1e6:.1f} MB)")


if __name__ == "__main__":
    program.run(main)
