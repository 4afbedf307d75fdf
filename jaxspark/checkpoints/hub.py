"""Checkpoints by Hub id, such as "Qwen/Qwen3-4B".

Only data is downloaded: JSON, safetensors and Jinja templates. Weights that can execute
code (.bin, .pt) and Python files never are.
"""

import re
from pathlib import Path

from jaxspark.checkpoints.folders import READ_SUFFIXES
from jaxspark.errors import CheckpointError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form "organization/name"."""
    return _ID.fullmatch(source) is not None


def download(repo_id: str) -> Path:
    """The local folder of a Hub checkpoint, downloaded if it is not in the cache.

    Raises:
      CheckpointError: offline, missing, or gated; says what to do.
    """
    # Imported here: only those who name a Hub id pay for the client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        folder = snapshot_download(
            repo_id,
            allow_patterns=[f"*{suffix}" for suffix in READ_SUFFIXES],
            ignore_patterns=["*/*"],
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo_id}: is gated; accept its licence on its Hub page, then set "
            "HF_TOKEN to a token of that account"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repo_id}: there is no such Hub checkpoint, or it is private (then set "
            "HF_TOKEN)"
        ) from error
    except Exception as error:  # The client passes on errors of its HTTP library.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(
            f"{repo_id}: is not in the download cache and cannot be downloaded "
            f"({reason}). Download it on a machine with network access (hf download "
            f"{repo_id}) and pass the folder, or use a local checkpoint"
        ) from error
    return Path(folder)
