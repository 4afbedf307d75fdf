"""Global JAX settings that must not change what is decoded, see `jaxspark.settings`.

A program that imports jaxspark may have set any of these for code of its own.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import jax

from jaxspark.exactness.audit_schedules import (
    MIXES,
    ScheduleAudit,
    ScheduleCell,
    ScheduleResult,
)


@dataclass(frozen=True)
class Setting:
    """One option of `jax.config` with a value that is not its default."""

    option: str
    value: object

    @property
    def name(self) -> str:
        """For reports."""
        return f"{self.option.removeprefix('jax_')}={self.value}"

    @property
    def rounds(self) -> bool:
        """Whether it chooses how products are rounded, and so may change any token."""
        return self.option == "jax_default_matmul_precision"

    @property
    def eager(self) -> bool:
        """Whether loops run operation by operation, a thousand times slower."""
        return self.option == "jax_disable_jit"

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Sets the option for the whole process, then sets it back."""
        before = getattr(jax.config, self.option)
        jax.config.update(self.option, self.value)
        try:
            yield
        finally:
            jax.config.update(self.option, before)


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("jax_default_prng_impl", "rbg"),
        Setting("jax_default_prng_impl", "unsafe_rbg"),
        Setting("jax_threefry_partitionable", False),
        Setting("jax_high_dynamic_range_gumbel", True),
        Setting("jax_enable_x64", True),
        Setting("jax_numpy_dtype_promotion", "strict"),
        Setting("jax_numpy_rank_promotion", "raise"),
        Setting("jax_transfer_guard", "disallow"),
        Setting("jax_debug_nans", True),
        Setting("jax_debug_infs", True),
        Setting("jax_default_matmul_precision", "bfloat16"),
        Setting("jax_default_matmul_precision", "highest"),
        Setting("jax_disable_jit", True),
    )
}


def audit_setting(
    audit: ScheduleAudit, setting: Setting, cell: ScheduleCell
) -> ScheduleResult:
    """Decodes a cell's requests under a setting.

    They are compared with the plain outputs that `audit` made: under JAX's defaults, or
    under this setting where it `rounds`.
    """
    with setting.applied():
        return audit.run(cell, mixes=MIXES[:1] if setting.eager else MIXES)
