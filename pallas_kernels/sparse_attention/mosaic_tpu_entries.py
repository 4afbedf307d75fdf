"""A plan's entries as operands of a TPU kernel whose grid is cores x groups."""

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.groups import group_block
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
    groups = {"per": plan.groups // cores, "groups": plan.groups_real}
    specs = [
        pl.BlockSpec(memory_space=pl.ANY),
        group_block((1, 1, n), **groups, together=together, memory_space=pltpu.SMEM),
    ]
    if plan.members is not None:
        specs += [group_block((1, 1, n), **groups)]
    return specs
