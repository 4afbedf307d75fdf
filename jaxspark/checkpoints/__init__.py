"""Checkpoints in and out: Hugging Face folders, GGUF files, drafters' folders.

Everything raises `CheckpointError`, before any long work, naming what was seen and what
was expected. No code from a checkpoint is ever executed.
"""

from jaxspark.checkpoints.built_in import BUILT_IN
from jaxspark.checkpoints.deepseek_v4_folder import save_deepseek_v4
from jaxspark.checkpoints.draft_folders import (
    FORMATS,
    draft_format,
    save_draft_checkpoint,
)
from jaxspark.checkpoints.load import (
    load_draft_checkpoint,
    load_drafter,
    load_target,
    save_target,
)
from jaxspark.errors import CheckpointError
from jaxspark.target import Target
from jaxspark.text import TextStream, Tokenizer

__all__ = [
    "BUILT_IN",
    "FORMATS",
    "CheckpointError",
    "Target",
    "TextStream",
    "Tokenizer",
    "draft_format",
    "load_draft_checkpoint",
    "load_drafter",
    "load_target",
    "save_deepseek_v4",
    "save_draft_checkpoint",
    "save_target",
]
