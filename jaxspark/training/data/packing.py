"""Packed sequences: documents side by side in rows of one length, apart by number.

The packing is fixed (first fit, in the order of the data), so a sequence has an index
under which its target features can be cached. Order and batches come from grain: batch
i is a function of the seed and i, so a run resumes exactly by its step number.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import grain
import jax
import numpy as np
from jaxtyping import Bool, Int

from jaxspark.training.data.documents import Document

# Open rows that first fit looks at: more waste less, fewer keep it fast.
_OPEN_ROWS = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """P sequences of S tokens.

    Attributes:
      ids_PS: tokens, 0 where padded.
      positions_PS: position of each token in its document.
      documents_PS: number of its document within the sequence, -1 where padded.
      trainable_PS: whether it is part of an answer.
      index_P: which sequence of the data it is.
    """

    ids_PS: Int[np.ndarray, "P S"]
    positions_PS: Int[np.ndarray, "P S"]
    documents_PS: Int[np.ndarray, "P S"]
    trainable_PS: Bool[np.ndarray, "P S"]
    index_P: Int[np.ndarray, " P"]

    def __getitem__(self, rows) -> "Packed":
        """Some of the sequences."""
        return Packed(*(getattr(self, field.name)[rows] for field in fields(self)))


def pack(documents: Sequence[Document], length: int) -> Packed:
    """All documents in sequences of `length` tokens, first fit.

    Args:
      documents: what to pack.
      length: tokens per sequence.

    Raises:
      ValueError: a document is longer than a sequence.
    """
    rows: list[list[Document]] = []
    room: list[int] = []
    for number, document in enumerate(documents):
        size = len(document.ids_L)
        if size > length:
            raise ValueError(
                f"document {number} has {size} tokens, a sequence holds {length}"
            )
        first = max(0, len(rows) - _OPEN_ROWS)
        for row in range(first, len(rows)):
            if room[row] >= size:
                break
        else:
            row = len(rows)
            rows.append([])
            room.append(length)
        rows[row].append(document)
        room[row] -= size
    shape = (len(rows), length)
    packed = Packed(
        ids_PS=np.zeros(shape, np.int32),
        positions_PS=np.zeros(shape, np.int32),
        documents_PS=np.full(shape, -1, np.int32),
        trainable_PS=np.zeros(shape, bool),
        index_P=np.arange(len(rows), dtype=np.int32),
    )
    for row, inside in enumerate(rows):
        begin = 0
        for number, document in enumerate(inside):
            span = slice(begin, begin + len(document.ids_L))
            packed.ids_PS[row, span] = document.ids_L
            packed.positions_PS[row, span] = np.arange(len(document.ids_L))
            packed.documents_PS[row, span] = number
            packed.trainable_PS[row, span] = document.trainable_L
            begin = span.stop
    return packed


@dataclass(frozen=True)
class Batches:
    """An endless sequence of batches: `batches[i]`, the same for the same seed.

    Attributes:
      packed: all sequences.
      size: sequences per batch; the last of an epoch is completed from the next one.
      seed: of the order, which differs from epoch to epoch.
    """

    packed: Packed
    size: int
    seed: int

    @property
    def per_epoch(self) -> float:
        """Batches in one pass over the data."""
        return len(self.packed.index_P) / self.size

    def __getitem__(self, step: int) -> Packed:
        count = self.size
        rows = [self._order[place] for place in range(step * count, (step + 1) * count)]
        return self.packed[np.array(rows)]

    @cached_property
    def _order(self):
        indices = grain.MapDataset.range(len(self.packed.index_P))
        return indices.seed(self.seed).shuffle().repeat()


def draft_vocabulary(
    packed: Packed, vocab_size: int, size: int, *, human_weight: float = 0.1
) -> Int[np.ndarray, " W"]:
    """The `size` tokens seen most in answers, ascending; prompts count a little.

    Prompts are human text, which spreads over rare words that an answer may take up.
    """
    real = packed.documents_PS >= 0
    ids, trainable = packed.ids_PS[real], packed.trainable_PS[real]
    counts_V = np.bincount(ids[trainable], minlength=vocab_size).astype(float)
    counts_V += human_weight * np.bincount(ids[~trainable], minlength=vocab_size)
    # Among unseen tokens the lower ids: tokenizers number merges by frequency.
    return np.sort(np.argsort(-counts_V, kind="stable")[:size])
