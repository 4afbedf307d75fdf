"""Which files were found to have their checksums, so that it need not be found again.

A stamp holds a file's digest and what the file system says of it: size, times of the
last change of content and of attributes, inode. It lies in the user's cache, for
folders of checkpoints may be read-only or another program's (the Hub cache refuses
foreign files). A stamp that is damaged, or that cannot be written, costs a checksum.
"""

import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

# A file may change twice within a tick of its file system's clock (2 s at worst), so
# one that has just changed is not stamped. Git calls such entries racy.
SETTLED_NS = 2 * 10**9


def state(path: Path) -> list[int]:
    """What is different after any change of the file."""
    seen = path.stat()
    return [seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino]


def is_stamped(path: Path, digest: str) -> bool:
    """Whether the file, as it is now, was found to have this digest."""
    try:
        return json.loads(_place(path).read_bytes()) == [digest, *state(path)]
    except (OSError, ValueError, RecursionError):
        return False


def stamp(path: Path, digest: str, before: list[int]) -> None:
    """Remembers a digest, unless the file has changed since its state `before`."""
    place = _place(path)
    try:
        if state(path) != before or time.time_ns() - max(before[1:3]) < SETTLED_NS:
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may do this at once: each stamp appears whole or not at all.
        with tempfile.NamedTemporaryFile("w", dir=place.parent, delete=False) as file:
            json.dump([digest, *before], file)
        os.replace(file.name, place)
    except OSError:
        pass


def _place(path: Path) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    name = hashlib.sha256(str(path.resolve()).encode("utf-8", "surrogateescape"))
    folder = Path(home).expanduser() / "jaxspark" / "verified"
    return folder / f"{name.hexdigest()[:40]}.json"
