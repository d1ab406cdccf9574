"""Text to documents to packed rows to batches: nothing lost, nothing mixed, the order a function of (seed, step)."""

from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import InputError
from train.data.loader import batches, fingerprint, whole_batches
from train.data.packing import pack
from train.data.text import find_files, read_documents, split_documents, standard_library

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


def test_files_that_are_not_text_are_skipped_and_named(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one ünïcode\n", encoding="utf-8")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\xff\xfe")
    (tmp_path / "c.bin").write_bytes(b"\0\0\0")
    (tmp_path / "d.txt").write_text("  \n")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "e.md").write_bytes(b"\xef\xbb\xbftwo")
    documents = read_documents(find_files([tmp_path]), 1000)
    assert documents.texts == ("one ünïcode\n", "two")
    assert [path.name for path in documents.skipped] == ["b.png", "c.bin"]


def test_paths_files_folders_and_patterns(tmp_path: Path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert [p.name for p in find_files([tmp_path / "c.md", tmp_path])] == ["c.md", "a.txt", "b.txt"]
    assert [p.name for p in find_files([str(tmp_path / "*.txt")])] == ["a.txt", "b.txt"]
    for missing in (tmp_path / "nothing", tmp_path / "*.rst"):
        with pytest.raises(InputError, match="No such file or folder"):
            find_files([missing])
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match="Found no text: 1 files"):
        read_documents([tmp_path / "b.txt"], 100)


def test_reading_stops_at_the_limit_and_cuts_a_first_long_file_between_characters(tmp_path: Path):
    long, short = tmp_path / "long", tmp_path / "short"
    long.write_text("é" * 100, encoding="utf-8")
    short.write_text("abc")
    assert read_documents([long, short], 101).texts == ("é" * 50,)
    assert read_documents([short, long], 101).texts == ("abc",)
    assert read_documents([short, long], 203).texts == ("abc", "é" * 100)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text("ab\n", min_size=1, max_size=50), min_size=2, max_size=30), st.integers(0, 5))
def test_split_is_by_document_and_holds_out_at_least_one(texts, seed):
    texts = [f"{i}:{text}" for i, text in enumerate(texts)]
    training, held_out = split_documents(texts, 0.2, seed)
    assert sorted(training + held_out) == sorted(texts)
    assert held_out
    assert training
    assert (training, held_out) == split_documents(texts, 0.2, seed)
    assert len(held_out) == 1 or sum(map(len, held_out)) <= 0.2 * sum(map(len, texts))


def test_a_single_document_is_cut_at_a_line_end():
    text = "".join(f"line {i}\n" for i in range(100))
    training, held_out = split_documents([text], 0.1, 0)
    assert training[0] + held_out[0] == text.rstrip("\n")
    assert training[0].endswith("\n")
    assert 0.05 < len(held_out[0]) / len(text) < 0.15
    with pytest.raises(InputError, match="Give more text"):
        split_documents(["one line"], 0.1, 0)


def test_standard_library_is_sorted_python_source_without_installed_packages():
    files = standard_library()
    assert files == standard_library()
    assert len(files) > 100
    assert all(path.suffix == ".py" and "site-packages" not in path.parts for path in files)
