"""One rule for choosing an implementation, shared by every op."""

from collections.abc import Callable, Mapping


def resolve(
    op: str, implementations: Mapping[str, Callable], implementation: str | None
) -> Callable:
    """The named implementation of `op`, or its reference "xla" for None.

    Raises:
      ValueError: no implementation of that name exists for `op`.
    """
    name = implementation or "xla"
    if name not in implementations:
        raise ValueError(
            f"{op} has no implementation {name!r}; available: {sorted(implementations)}"
        )
    return implementations[name]
