"""Documents are packed once, keep apart, and come in an order known in advance."""

import numpy as np
import pytest

from jaxspark.training.data.packing import Batches, draft_vocabulary
from tests.training import made


def test_every_token_is_packed_once():
    sizes = (30, 20, 10, 48, 1, 2, 3, 4, 5)
    packed = made.packed(*sizes)
    found = []
    for row in range(len(packed.index_P)):
        for number in range(packed.documents_PS[row].max() + 1):
            mine = packed.documents_PS[row] == number
            assert packed.positions_PS[row][mine].tolist() == list(range(mine.sum()))
            found.append(packed.ids_PS[row][mine].tolist())
    expected = [
        made.document(size, 1, i).ids_L.tolist() for i, size in enumerate(sizes)
    ]
    assert sorted(found) == sorted(expected)
    assert not packed.trainable_PS[packed.documents_PS < 0].any()


def test_a_document_longer_than_a_sequence_is_refused():
    with pytest.raises(ValueError, match="document 0 has 49 tokens, .* holds 48"):
        made.packed(49)


def test_batches_depend_on_seed_and_step_alone():
    packed = made.packed(*[40] * 10)
    one, other = Batches(packed, 4, 0), Batches(packed, 4, 0)
    in_order = [one[step].index_P.tolist() for step in range(5)]
    assert [other[step].index_P.tolist() for step in (4, 2, 0)] == in_order[4::-2]
    seen = np.concatenate(in_order)
    assert sorted(seen[:10].tolist()) == list(range(10))
    assert sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    assert Batches(packed, 4, 1)[0].index_P.tolist() != in_order[0]


def test_a_draft_vocabulary_holds_the_commonest_answer_tokens():
    packed = made.packed(*[40] * 10)
    counts = np.bincount(packed.ids_PS[packed.trainable_PS], minlength=61)
    ids = draft_vocabulary(packed, 61, 8, human_weight=0.0)
    assert (np.diff(ids) > 0).all()
    assert counts[ids].min() >= np.delete(counts, ids).max()
