"""Keeps a server's memory from growing: all threads share glibc's main arena.

By default glibc gives threads up to eight arenas per core. Each keeps what was freed
in it, and what a request leaves behind lies in another one than what the next one
needs, so resident memory grows for a long time although nothing is kept.
"""

import ctypes
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
