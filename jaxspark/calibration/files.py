"""Calibrations kept beside a drafter: `calibration.json` in its folder.

One entry for each coupling and way of drafting: prompt lookup beside a model changes
which of its drafts are ever judged, so "hybrid" has temperatures of its own.
"""

import json
from pathlib import Path

from jaxspark.checkpoints.folders import cover
from jaxspark.checkpoints.load import NAMED_DRAFTERS, drafter_folder
from jaxspark.decoding import Calibration
from jaxspark.decoding.couplings import Coupling

FILE = "calibration.json"
# 2: certainty of greedy drafts and under gumbel is in log-odds.
# 3: drafters without a confidence head have the confidence that certainty suggests.
FORMAT = "jaxspark-calibration-3"


class MissingCalibration(ValueError):
    """A drafter that nobody calibrated for such rounds."""


def load_calibration(source: str | Path, coupling: Coupling) -> Calibration:
    """The calibration that belongs to a drafter.

    Args:
      source: as for `load_drafter`: "dspark", a folder, either after "hybrid:".
      coupling: "rejection" or "gumbel".

    Raises:
      MissingCalibration: there is none for this coupling and way of drafting.
      ValueError: the file is damaged, or there is no such drafter.
    """
    if source in NAMED_DRAFTERS:
        raise MissingCalibration(f"{source} has no trained confidences")
    folder, hybrid = drafter_folder(source)
    path = folder / FILE
    entries = _entries(path)
    for entry in entries:
        if (entry["hybrid"], entry["coupling"]) == (hybrid, coupling):
            return _calibration(entry)
    seen = [f"{e['coupling']}{', hybrid' if e['hybrid'] else ''}" for e in entries]
    raise MissingCalibration(
        f"{path}: has no calibration for {source} under coupling {coupling!r} (it has: "
        f"{'; '.join(seen) or 'none'}); make one with `jaxspark calibrate`"
    )


def save_calibration(source: str | Path, calibration: Calibration) -> Path:
    """Writes or replaces one entry; returns the file."""
    folder, hybrid = drafter_folder(source)
    path = folder / FILE
    entries = [
        entry
        for entry in _entries(path)
        if (entry["hybrid"], entry["coupling"]) != (hybrid, calibration.coupling)
    ]
    entries.append(
        {
            "hybrid": hybrid,
            "coupling": calibration.coupling,
            "fitted_at": calibration.fitted_at,
            "temperatures": calibration.temperatures,
            "biases": calibration.biases,
            "weights": calibration.weights,
            "prior_blocks": calibration.prior_blocks,
        }
    )
    path.write_text(json.dumps({"format": FORMAT, "entries": entries}, indent=1) + "\n")
    cover(folder, FILE)
    return path


def _calibration(entry: dict) -> Calibration:
    def rows(kept):
        return None if kept is None else tuple(map(tuple, kept))

    blocks = entry.get("prior_blocks", entry.get("usual"))  # its earlier name
    return Calibration(
        coupling=entry["coupling"],
        fitted_at=tuple(entry["fitted_at"]),
        temperatures=tuple(map(tuple, entry["temperatures"])),
        biases=rows(entry["biases"]),
        # Files of an earlier time have neither.
        weights=rows(entry.get("weights")),
        prior_blocks=None if blocks is None else tuple(map(rows, blocks)),
    )


def _entries(path: Path) -> list[dict]:
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format is {content['format']!r}, expected {FORMAT!r}")
        for entry in content["entries"]:
            _calibration(entry)
            bool(entry["hybrid"])
        return content["entries"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is no calibration ({error!r})") from error
