"""Gradients of the op's operands, by kernels that read recent rows in order."""

import functools
from collections.abc import Callable
from dataclasses import replace

import jax

from pallas_kernels.rings import in_order
from pallas_kernels.sparse_attention.entries import Entries


def gradients_of(operands: tuple, differentiate: Callable[[tuple], tuple]) -> tuple:
    """Gradients of queries, keys, rows before them, sinks and entries; others' None.

    XLA takes recent rows out of their ring, and hands their gradients back to it.

    Args:
      operands: the op's, with integers of 32 bits.
      differentiate: gives gradients of the first four, and of the entries' rows (None
        without entries), of the operands with the rows before a pass in order.
    """
    q_TNH, keys_TH, before, sinks_N, ragged, entries, rotary = operands
    with jax.enable_x64(False):
        ordered = functools.partial(in_order, ragged=ragged)
        before_BWH, unordered = jax.vjp(ordered, before)
        dq_TNH, dkeys_TH, dbefore_BWH, dsinks_N, drows = differentiate(
            (q_TNH, keys_TH, before_BWH, sinks_N, ragged, entries, rotary)
        )
        [dbefore] = unordered(dbefore_BWH)
    dentries = None
    if drows is not None:
        table = replace(entries.table, rows_LBCH=drows, layer=None, pages_BP=None)
        dentries = Entries(table)
    return dq_TNH, dkeys_TH, dbefore, dsinks_N, None, dentries, None
