"""One rule for choosing an implementation, shared by every op.

"xla" always exists and is the specification. Others are for some platforms and some
operands. Which of them runs is decided by the platform a program is lowered for
(`jax.lax.platform_dependent`), not by the machine that traces it: one function compiles
for CPU, GPU and TPU, on any host.
"""

import functools
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

_LOG = logging.getLogger(__name__)
_HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")


def _anything(*operands, **static) -> None:
    """Supports all operands."""


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to compute an op.

    Attributes:
      run: the op, of its operands (arrays) and static keywords.
      platforms: those it is taken on unasked: "tpu", "cuda"; none for the reference.
      supports: why it cannot take these operands, in a few words; None if it can.
    """

    run: Callable[..., Any]
    platforms: tuple[str, ...] = ()
    supports: Callable[..., str | None] = _anything


def expected_platform() -> str:
    """The platform that arrays and programs are being made for: "cpu", "tpu", "gpu".

    For what must be chosen before lowering: how wide a cache's rows are, how large a
    kernel's tiles. It is that of the abstract mesh in use, which names the device when
    compiling for one that is not here (`jax.sharding.use_abstract_mesh`), else that of
    the default device.
    """
    device = _expected_device()
    return device if isinstance(device, str) else device.platform


def expected_kind() -> str:
    """The kind of that device, as it calls itself: "cpu", "NVIDIA H100 80GB HBM3"."""
    device = _expected_device()
    return device if isinstance(device, str) else device.device_kind


def not_hopper() -> str | None:
    """Why the device that programs are being made for is no Hopper; None if it may be.

    It may where programs are being made for no GPU in particular.
    """
    kind = expected_kind()
    if expected_platform() == "gpu" and not _HOPPER.search(kind):
        return f"is made of Hopper's instructions, not for {kind}"
    return None


def no_hopper(*operands) -> str | None:
    """Why Hopper's matrix units cannot take operands; None if they can, or may."""
    if reason := not_hopper():
        return reason
    if (given := {each.dtype for each in operands}) != {jnp.dtype(jnp.bfloat16)}:
        return (
            "computes in bfloat16, Hopper's matrix units having no float32, got "
            f"{sorted(map(str, given))}"
        )
    return None


def _expected_device():
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    return abstract or jax.config.jax_default_device or jax.devices()[0]


def call(
    op: str,
    implementations: Mapping[str, Implementation],
    implementation: str | None,
    *operands,
    **static,
):
    """Runs an op by the named implementation, or by the best for the platform.

    Unasked, each platform gets the first implementation for it that supports the
    operands, else "xla"; a fallback is logged once.

    Raises:
      ValueError: no implementation of that name exists, or it does not support the
        operands.
    """
    if implementation is not None:
        if implementation not in implementations:
            raise ValueError(
                f"{op} has no implementation {implementation!r}; available: "
                f"{sorted(implementations)}"
            )
        named = implementations[implementation]
        reason = named.supports(*operands, **static)
        if reason is not None:
            raise ValueError(f"{op}: {implementation} {reason}")
        return named.run(*operands, **static)
    platforms = {name for each in implementations.values() for name in each.platforms}
    chosen = {}
    for platform in sorted(platforms):
        name = best_for(platform, op, implementations, *operands, **static)
        if name != "xla":
            chosen[platform] = functools.partial(implementations[name].run, **static)
    reference = functools.partial(implementations["xla"].run, **static)
    if not chosen:
        return reference(*operands)
    return jax.lax.platform_dependent(*operands, default=reference, **chosen)


def best_for(
    platform: str,
    op: str,
    implementations: Mapping[str, Implementation],
    *operands,
    **static,
) -> str:
    """The implementation that a platform's programs take unasked; logs fallbacks."""
    for name, each in implementations.items():
        if platform in each.platforms:
            reason = each.supports(*operands, **static)
            if reason is None:
                return name
            _log_fallback(op, name, reason)
    return "xla"


@functools.cache
def _log_fallback(op: str, name: str, reason: str) -> None:
    _LOG.info("%s falls back to xla: %s %s", op, name, reason)
