"""What the decode loop asks of a target model and of its caches."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import jax
from jaxtyping import Array, Float, Int

from jaxspark.models.batch import FlatTokens


@runtime_checkable
class TargetModel(Protocol):
    """A language model on flat tokens; its parameters are its pytree leaves.

    `config` has at least `vocab_size`, `hidden_size` and `max_position_embeddings`.
    """

    config: Any

    @property
    def dtype(self) -> Any:
        """Type of activations and caches."""

    @property
    def max_rewind(self) -> int | None:
        """Most positions that a slot may be set back by; None for any number."""

    @property
    def norm(self) -> Callable[[Float[Array, "T D"]], Float[Array, "T D"]]:
        """The last norm; the head multiplies what it gives."""

    @property
    def head_VD(self) -> Float[Array, "V D"]:
        """The LM head's matrix."""

    def init_cache(self, slots: int, length: int) -> Any:
        """Empty caches for `slots` sequences of up to `length` positions."""

    def embed(self, ids_T: Int[Array, " T"]) -> Float[Array, "T D"]:
        """Embedding rows of token ids."""

    def logits(self, x_TD: Float[Array, "T D"]) -> Float[Array, "T V"]:
        """float32 logits of final hidden states, the last norm included."""

    def __call__(
        self, tokens: FlatTokens, cache: Any, *, taps: Sequence[int] = ()
    ) -> tuple[Float[Array, "T D"], Float[Array, "T m D"], Any]:
        """Processes T flat tokens of any mix of slots.

        Args:
          tokens: what to process.
          cache: of `init_cache`, holding all earlier positions.
          taps: layers whose outputs to return, 0-based; -1 is the embedding.

        Returns:
          Final hidden states before the last norm (see `logits`), the taps in the
          order asked for, and the cache with the tokens' rows written.
        """


@runtime_checkable
class SlotTable(Protocol):
    """A table of cache rows that knows where its slots are.

    Attributes:
      grows: whether it has rows for every position, which then can lie in pages.
    """

    grows: ClassVar[bool]

    def at_slots(self, slots_N: Int[Array, " N"]) -> Self:
        """The rows of N slots; numbers past the last slot read the last."""

    def with_slots(self, slots_N: Int[Array, " N"], rows: Self) -> Self:
        """With the rows of N slots replaced; numbers past the last are skipped."""

    def pool(self, pages: int) -> Self:
        """If it grows, an empty pool of pages for such rows, see `pages`."""


def at_slots[CacheT](
    cache: CacheT, slots_N: Int[Array, " N"], *, paged: bool = False
) -> CacheT:
    """A cache of N slots only; numbers past the last slot read the last.

    Leaves have their slots on the first axis, unless they are a `SlotTable`. Tables in
    pages stay whole: it is the page table that names slots.
    """

    def take(leaf):
        if not is_table(leaf):
            return leaf.at[slots_N].get(mode="clip")
        return leaf if paged and leaf.grows else leaf.at_slots(slots_N)

    return jax.tree.map(take, cache, is_leaf=is_table)


def with_slots[CacheT](
    cache: CacheT, slots_N: Int[Array, " N"], part: CacheT, *, paged: bool = False
) -> CacheT:
    """The cache with `part` in N slots; numbers past the last slot are skipped."""

    def put(leaf, new):
        if not is_table(leaf):
            return leaf.at[slots_N].set(new, mode="drop")
        return new if paged and leaf.grows else leaf.with_slots(slots_N, new)

    return jax.tree.map(put, cache, part, is_leaf=is_table)


def is_table(node: Any) -> bool:
    """Whether a node of a cache is a `SlotTable`."""
    return isinstance(node, SlotTable)
