"""Writes golden/drafters.npz with other projects' own classes (see `peers.py`).

  export JAXSPARK_DEEPSPEC=... JAXSPARK_SPECULATORS=...
  python -m tests.parity.make_golden_drafters

The file holds their folders and ours without numbers, and what they say of both.
"""

import tempfile
from pathlib import Path

import numpy as np

from tests.parity import drafter_cases as cases
from tests.parity import drafter_folders, golden
from tests.parity.oracle_client import Oracle, oracle_python

FILE = golden.FOLDER / "drafters.npz"


def main():
    """Asks about every case, in both directions."""
    python = oracle_python()
    if python is None:
        raise SystemExit("no PyTorch: run `make oracle` first")
    oracle = Oracle(python, "peers.py")
    header, arrays = {}, {}
    for name in cases.CASES:
        with tempfile.TemporaryDirectory() as temporary:
            place = Path(temporary)
            target = drafter_folders.target(cases.family(name), place / "target")
            request = {"case": name, "target": target.name}
            theirs = place / "theirs"
            oracle.ask(request | {"save": str(theirs)})
            ours = drafter_folders.rewritten(name, theirs, target, place / "ours")
            said = oracle.ask(request | {"folder": str(theirs)})
            of_ours = oracle.ask(request | {"folder": str(ours)})
            for key, value in said.items():
                np.testing.assert_array_equal(of_ours[key], value, err_msg=name)
                arrays[f"{name}.{key}"] = value
            header[name] = {
                "theirs": drafter_folders.description(theirs, target),
                "ours": drafter_folders.description(ours, target),
            }
    golden.save(FILE, arrays, **header)
    oracle.close()


if __name__ == "__main__":
    main()
