"""What the queries of a group chose, each entry once, and who chose it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.ragged import LANES, QUERIES

# A word holds an entry's number and who chose it.
MOST_ENTRIES = 2 ** (31 - QUERIES) - 1
_LAST = 2**31 - 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Union:
    """Entries that any query of a group chose; n is a multiple of 128.

    Attributes:
      rows_G1n: the entries; 0 behind the last.
      members_G1n: bit q: query q of the group chose it; 0 behind the last.
      used_G: how many they are; entries that nobody chose may lie among them.
    """

    rows_G1n: Int[Array, "G 1 n"]
    members_G1n: Int[Array, "G 1 n"]
    used_G: Int[Array, " G"]


def union(chosen_GQX: Int[Array, "G Q X"]) -> Union:
    """Of the choices of each group's queries, -1 naming nothing.

    Of the sorted pairs (row, query) the first of a row stands for it and learns of the
    few behind it; a second sort brings those to the front.

    Args:
      chosen_GQX: what each query chose, no entry twice.
    """
    G, Q, X = chosen_GQX.shape
    chosen_GQX = chosen_GQX.astype(jnp.int32)
    query_Q1 = jnp.arange(Q, dtype=jnp.int32)[:, None]
    pair_GQX = jnp.where(chosen_GQX < 0, _LAST, chosen_GQX * QUERIES + query_Q1)
    pair_Gn = jnp.sort(pair_GQX.reshape(G, Q * X), axis=-1)
    row_Gn, query_Gn = pair_Gn // QUERIES, pair_Gn % QUERIES
    bits_Gn = 1 << query_Gn
    for step in range(1, Q):
        same = jnp.pad(row_Gn[:, step:] == row_Gn[:, :-step], ((0, 0), (0, step)))
        later = jnp.pad(query_Gn[:, step:], ((0, 0), (0, step)))
        bits_Gn |= jnp.where(same, 1 << later, 0)
    new_Gn = jnp.pad(
        row_Gn[:, 1:] != row_Gn[:, :-1], ((0, 0), (1, 0)), constant_values=True
    )
    new_Gn &= pair_Gn != _LAST
    packed = jnp.where(new_Gn, row_Gn << QUERIES | bits_Gn, _LAST)
    packed_Gn = jnp.sort(packed, axis=-1)
    used_G = jnp.sum(new_Gn, axis=-1, dtype=jnp.int32)
    real_Gn = packed_Gn != _LAST
    rows_Gn = jnp.where(real_Gn, packed_Gn >> QUERIES, 0)
    bits_Gn = jnp.where(real_Gn, packed_Gn & (1 << QUERIES) - 1, 0)
    rest = ((0, 0), (0, -(Q * X) % LANES))
    rows_Gn, bits_Gn = jnp.pad(rows_Gn, rest), jnp.pad(bits_Gn, rest)
    return Union(rows_Gn[:, None], bits_Gn[:, None], used_G)


def alone(chosen_GX: Int[Array, "G X"]) -> Union:
    """Of groups of one query: what it chose, as it lies, with -1 between them."""
    named_GX = chosen_GX >= 0
    rest = ((0, 0), (0, -chosen_GX.shape[1] % LANES))
    rows_Gn = jnp.pad(jnp.maximum(chosen_GX, 0).astype(jnp.int32), rest)
    members_Gn = jnp.pad(named_GX.astype(jnp.int32), rest)
    place_X = 1 + jnp.arange(chosen_GX.shape[1])
    used_G = jnp.where(named_GX, place_X, 0).max(-1)
    return Union(rows_Gn[:, None], members_Gn[:, None], used_G)
