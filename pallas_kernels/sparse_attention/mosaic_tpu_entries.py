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
    per, n = plan.groups // cores, plan.pieces.shape[-1]

    def of_group(shape, divisor=1, **options):
        last = plan.groups_real // divisor - 1
        zeros = (0,) * (len(shape) - 1)

        def index(core, i, *_):
            return (jnp.minimum((core * per + i) // divisor, last), *zeros)

        return pl.BlockSpec(shape, index, **options)

    divisor = plan.groups_real // len(plan.pieces)
    specs = [pl.BlockSpec(memory_space=pl.ANY)]
    specs += [of_group((1, 1, n), divisor, memory_space=pltpu.SMEM)]
    if plan.members is not None:
        specs += [of_group((1, 1, n))]
    return specs
