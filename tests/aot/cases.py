"""What is compiled for which chips.

`make aot` compiles every op for every chip at the sizes of both models, and what is
special (gradients, long passes, pages, several chips, other types) for one chip each,
not always the same: on two cores all of it, rounds included, is to take no more than a
quarter of an hour. Other runs compile a few programs, for a TPU v5e and an H100.
"""

import os

ALL = bool(os.environ.get("JAXSPARK_AOT_ALL"))
V5E, V5P, V6E, TPU7X = TPUS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


def by_chip(
    each: tuple[str, ...],
    once: dict[str, tuple[str, ...]] | None = None,
    *,
    quick: tuple[str, ...],
) -> dict[str, tuple[str, ...]]:
    """Cases of every TPU.

    Args:
      each: cases that each compiles.
      once: more cases of some.
      quick: all that other runs compile, for a v5e.
    """
    if not ALL:
        return {V5E: quick}
    return {chip: (*each, *(once or {}).get(chip, ())) for chip in TPUS}
