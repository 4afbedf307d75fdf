"""Blocks of what groups of queries have, for TPU kernels of a grid cores x groups."""

import jax.numpy as jnp
from jax.experimental import pallas as pl


def group_block(
    shape: tuple[int, ...],
    *,
    per: int,
    groups: int,
    together: int = 1,
    ahead: int = 0,
    **options,
) -> pl.BlockSpec:
    """A step's block [1, ...] of an operand; steps past the last group have its block.

    Args:
      shape: of the block.
      per: groups of a core.
      groups: that the operand has.
      together: how many of them, one after another, have a block in common.
      ahead: by how many groups the block is ahead of its step.
      **options: of the block.
    """
    last, zeros = groups // together - 1, (0,) * (len(shape) - 1)

    def index(core, i, *_):
        return (jnp.minimum((core * per + i + ahead) // together, last), *zeros)

    return pl.BlockSpec(shape, index, **options)
