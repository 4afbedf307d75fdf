"""A plan's entries as operands of a TPU kernel whose grid is cores x groups."""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.sparse_attention.plan import Plan


def entry_operands(plan: Plan) -> list[Array]:
    """The table, pieces, and members where there are some.

    The table stays where it lies: XLA would fetch a small one, of which little is read.
    """
    table = pltpu.with_memory_space_constraint(plan.table, pltpu.HBM)
    lists = [each for each in (plan.pieces, plan.members) if each is not None]
    return [table, *lists]


def entry_specs(plan: Plan, cores: int) -> list[pl.BlockSpec]:
    """The table whole, and a step's blocks of the lists."""
    n, together = plan.pieces.shape[-1], plan.groups_real // len(plan.pieces)
    pieces = of_group(plan, cores, (1, 1, n), together, memory_space=pltpu.SMEM)
    specs = [pl.BlockSpec(memory_space=pl.ANY), pieces]
    if plan.members is not None:
        specs += [of_group(plan, cores, (1, 1, n))]
    return specs


def of_group(
    plan: Plan, cores: int, shape: tuple[int, ...], together: int = 1, **options
) -> pl.BlockSpec:
    """A step's block of what groups have, or some groups together, one after another."""
    per, last = plan.groups // cores, plan.groups_real // together - 1
    zeros = (0,) * (len(shape) - 1)

    def index(core, i, *_):
        return (jnp.minimum((core * per + i) // together, last), *zeros)

    return pl.BlockSpec(shape, index, **options)
