"""Packing conserves tokens and never crosses documents."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import InputError
from train.data.packing import pack

DOCUMENTS = st.lists(st.lists(st.integers(0, 99), max_size=40), min_size=1, max_size=20).filter(any)


def segments(rows):
    """The pieces of documents that the segment ids of each row delimit."""
    for tokens, ids in zip(rows.tokens, rows.segment_ids, strict=True):
        for segment in range(1, ids.max() + 1):
            yield tokens[ids == segment]


@settings(deadline=None, max_examples=60)
@given(DOCUMENTS, st.integers(2, 17))
def test_packing_conserves_tokens_and_never_crosses_documents(documents, length):
    rows = pack(documents, length)
    # Every token once, in order; padding only at the end of the last row.
    real = rows.loss_weights > 0
    np.testing.assert_array_equal(rows.tokens[real], np.concatenate([d for d in documents if d]))
    np.testing.assert_array_equal(real, rows.segment_ids > 0)
    assert np.all(np.diff(real.ravel().astype(int)) <= 0)
    assert (~real).sum() < length
    # A segment lies in one document: cutting each document where rows end gives exactly the segments.
    offset, pieces = 0, []
    for document in documents:
        for token in document:
            if offset % length == 0:
                pieces.append([])
            pieces[-1].append(token)
            offset += 1
        if document and offset % length:
            pieces.append([])
    expected = [piece for piece in pieces if piece]
    assert [s.tolist() for s in segments(rows)] == expected


@settings(deadline=None, max_examples=30)
@given(DOCUMENTS, st.integers(2, 17))
def test_positions_count_from_zero_in_each_segment(documents, length):
    rows = pack(documents, length)
    for positions, ids in zip(rows.positions, rows.segment_ids, strict=True):
        for segment in range(1, ids.max() + 1):
            np.testing.assert_array_equal(positions[ids == segment], np.arange((ids == segment).sum()))
            # Contiguous.
            assert np.ptp(np.flatnonzero(ids == segment)) == (ids == segment).sum() - 1


def test_packing_refuses_nothing():
    with pytest.raises(InputError, match="at least one token"):
        pack([[], []], 8)
    with pytest.raises(InputError, match="at least 2"):
        pack([[1, 2]], 1)
