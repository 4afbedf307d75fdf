"""Memory of a server's process: that it does not grow, and that nobody waits for it.

By default glibc gives threads up to eight arenas per core. Each keeps what was freed
in it, and what a request leaves behind lies in another one than what the next one
needs, so resident memory grows for a long time although nothing is kept.

Python looks for cycles of garbage among everything it has. What a server has when it is
ready (modules, traced programs: half a million objects) stays; to look through it takes
a quarter of a second, for which all outputs stand still.
"""

import ctypes
import gc
import os
import sys

# Of mallopt(3), in malloc.h.
_M_ARENA_MAX = -8


def share_arena() -> bool:
    """Makes threads that begin from now on allocate in the main arena.

    Does nothing where the environment says how many arenas there are, or where memory
    is not glibc's.

    Returns:
      Whether it was done.
    """
    told = "MALLOC_ARENA_MAX" in os.environ or "arena_max" in os.environ.get(
        "GLIBC_TUNABLES", ""
    )
    if told or sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_ARENA_MAX, 1))


def keep_everything() -> None:
    """Garbage is no more looked for among the objects that there are now."""
    gc.collect()
    gc.freeze()
