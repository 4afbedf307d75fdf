"""Writing measured figures as JSON."""

import json
import math
from pathlib import Path
from typing import Any

import jax


def write_figures(path: str | Path, figures: dict[str, Any]) -> None:
    """Writes what a program measured as JSON, making the folder; NaN becomes null.

    Of the processes of a job the first one writes.
    """
    if jax.process_index():
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_without_nan(figures), indent=1) + "\n")


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
