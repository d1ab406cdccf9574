"""Batches of rows in memory: an order that is a function of (seed, step), and evaluation batches."""

import jax
import numpy as np
import pytest

from qwen_jax.errors import InputError
from train.data.loader import batches, fingerprint, whole_batches
from train.data.packing import pack


@pytest.fixture
def rows():
    return pack([np.arange(n) for n in (50, 3, 120, 27)], 8)


def test_order_is_a_pure_function_of_seed_and_step(rows):
    first, again, other = batches(rows, 4, seed=3), batches(rows, 4, seed=3), batches(rows, 4, seed=4)
    # Asked for in another order, and from another object.
    for step in (11, 0, 7, 0):
        jax.tree.map(np.testing.assert_array_equal, first[step], again[step])
    assert any(not np.array_equal(first[step].tokens, other[step].tokens) for step in range(4))


def test_every_pass_has_each_row_once_in_a_new_order(rows):
    count = rows.shape[0]
    data = batches(rows, 1, seed=0)

    def one_pass(epoch):
        return [data[epoch * count + i].tokens[0].tobytes() for i in range(count)]

    everything = sorted(row.tobytes() for row in rows.tokens)
    assert sorted(one_pass(0)) == sorted(one_pass(1)) == everything
    assert one_pass(0) != one_pass(1)


def test_fields_of_a_batch_stay_together(rows):
    batch = batches(rows, 4, seed=0)[2]
    for i in range(4):
        match = [r for r in range(rows.shape[0]) if np.array_equal(rows.tokens[r], batch.tokens[i])]
        assert any(
            np.array_equal(rows.positions[r], batch.positions[i])
            and np.array_equal(rows.segment_ids[r], batch.segment_ids[i])
            and np.array_equal(rows.loss_weights[r], batch.loss_weights[i])
            for r in match
        )


def test_a_batch_larger_than_the_data_is_refused(rows):
    with pytest.raises(InputError, match=r"takes 99 rows of 8 tokens.*Give more text"):
        batches(rows, 99, seed=0)


def test_evaluation_batches_hold_every_row_once_and_padding_weighs_nothing(rows):
    parts = whole_batches(rows, 7)
    assert {part.shape for part in parts} == {(7, 8)}
    tokens = np.concatenate([part.tokens for part in parts])
    weights = np.concatenate([part.loss_weights for part in parts])
    np.testing.assert_array_equal(tokens[: rows.shape[0]], rows.tokens)
    assert weights.sum() == rows.loss_weights.sum()
    assert np.all(weights[rows.shape[0] :] == 0)


def test_fingerprint_sees_every_field(rows):
    original = fingerprint(rows)
    assert fingerprint(jax.tree.map(np.copy, rows)) == original
    for i in range(4):
        leaves, treedef = jax.tree.flatten(jax.tree.map(np.copy, rows))
        leaves[i][2, 3] += 1
        assert fingerprint(jax.tree.unflatten(treedef, leaves)) != original
