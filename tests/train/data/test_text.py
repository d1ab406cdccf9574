"""Text files are found, read and split; what is not text is skipped and named."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import InputError
from train.data.text import find_files, read_documents, split_documents, standard_library


def test_files_that_are_not_text_are_skipped_and_named(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one ünïcode\n", encoding="utf-8")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\xff\xfe")
    (tmp_path / "c.bin").write_bytes(b"\0\0\0")
    (tmp_path / "d.txt").write_text("  \n")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "e.md").write_bytes(b"\xef\xbb\xbftwo\r\nlines\r\n")  # As Windows writes it.
    documents = read_documents(find_files([tmp_path]), 1000)
    assert documents.texts == ("one ünïcode\n", "two\nlines\n")
    assert [path.name for path in documents.skipped] == ["b.png", "c.bin"]


def test_paths_files_folders_and_patterns(tmp_path: Path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert [p.name for p in find_files([tmp_path / "c.md", tmp_path])] == ["c.md", "a.txt", "b.txt"]
    assert [p.name for p in find_files([str(tmp_path / "*.txt")])] == ["a.txt", "b.txt"]
    for missing in (tmp_path / "nothing", tmp_path / "*.rst"):
        with pytest.raises(InputError, match="No such file or folder"):
            find_files([missing])
    for odd in ("x" * 256, "~nobody-of-this-name/x"):
        with pytest.raises(InputError, match=r"Cannot look for|No such file or folder"):
            find_files([odd])
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
