"""Training a byte-level BPE: what it learns, that it repeats, and what it refuses."""

import itertools
import json
import pickle
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import CONTROL_TOKENS, ByteLevelBPE, train_bpe
from qwen_jax.tokenizer.bpe import SPLIT_PATTERN

TEXTS = [
    Path(__file__).read_text(),
    "der Fuchs springt über den faulen Hund, 12345 mal. " * 20,
    "今日は良い天気ですね。" * 9,
]


@pytest.fixture(scope="module")
def trained() -> ByteLevelBPE:
    return train_bpe(TEXTS, 500)


def test_ids_are_bytes_then_merges_then_control_tokens(trained: ByteLevelBPE) -> None:
    assert trained.vocab_size == 500
    assert sorted(trained.token_bytes(i) for i in range(256)) == [bytes([b]) for b in range(256)]
    assert [trained.id_to_token(i) for i in range(478, 500)] == [token.content for token in CONTROL_TOKENS]
    assert trained.special_ids == {478 + n for n, token in enumerate(CONTROL_TOKENS) if token.special}
    assert trained.eos_id == trained.pad_id == 478


def test_every_merge_was_the_most_frequent_pair(trained: ByteLevelBPE, tmp_path: Path) -> None:
    """The definition of BPE training, counted naively over the pieces of the pre-tokeniser."""
    trained.save(tmp_path)
    merges = [line.split(" ") for line in (tmp_path / "merges.txt").read_text().splitlines()]
    assert len(merges) == 500 - 22 - 256
    names = {trained.token_bytes(i): trained.id_to_token(i) for i in range(256)}
    pieces: Counter[tuple[str, ...]] = Counter()
    for text in TEXTS:
        for piece in regex.findall(SPLIT_PATTERN, unicodedata.normalize("NFC", text)):
            pieces[tuple(names[bytes([b])] for b in piece.encode())] += 1
    for left, right in merges:
        counts: Counter[tuple[str, str]] = Counter()
        for piece, n in pieces.items():
            for pair in itertools.pairwise(piece):
                counts[pair] += n
        assert counts[left, right] == max(counts.values())
        pieces = Counter({tuple(joined(piece, left, right)): n for piece, n in pieces.items()})


def joined(piece: tuple[str, ...], left: str, right: str) -> Iterator[str]:
    i = 0
    while i < len(piece):
        if piece[i : i + 2] == (left, right):
            yield left + right
            i += 2
        else:
            yield piece[i]
            i += 1


def test_same_texts_give_the_same_tokenizer(trained: ByteLevelBPE, tmp_path: Path) -> None:
    paths = []
    for n, text in enumerate(TEXTS):
        paths.append(tmp_path / f"{n}.txt")
        paths[-1].write_text(text, encoding="utf-8")
    assert train_bpe(paths, 500).fingerprint() == trained.fingerprint()
    assert train_bpe((text.encode() for text in TEXTS), 500).fingerprint() == trained.fingerprint()
    assert train_bpe([*TEXTS, "another text " * 50], 500).fingerprint() != trained.fingerprint()


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60))
def test_text_comes_back_composed(text: str) -> None:
    """decode(encode(x)) is x in NFC, for any Unicode text, also of scripts that training never saw."""
    for parse_special in (True, False):
        ids = SMALL.encode(text, parse_special=parse_special)
        assert SMALL.decode(ids) == unicodedata.normalize("NFC", text)
        assert all(0 <= i < SMALL.vocab_size for i in ids)


SMALL = train_bpe(["ab ab abc"], 290)


def test_a_small_corpus_gives_fewer_ids() -> None:
    assert train_bpe(["ab ab"], 1000).vocab_size < 290
    assert train_bpe([], 1000).vocab_size == 256 + 22


def test_a_tokenizer_travels_to_worker_processes(trained: ByteLevelBPE) -> None:
    copy = pickle.loads(pickle.dumps(trained))
    for parse_special in (True, False):
        text = "der Fuchs<|im_end|>"
        assert copy.encode(text, parse_special=parse_special) == trained.encode(text, parse_special=parse_special)
    assert copy.fingerprint() == trained.fingerprint()


def test_min_frequency_bounds_merges() -> None:
    assert train_bpe(["qx qx zj"], 300, min_frequency=3).vocab_size == 278
    assert train_bpe(["qx qx zj"], 300, min_frequency=1).token_to_id("zj") is not None


def test_progress_is_silent_unless_asked(capfd: pytest.CaptureFixture[str]) -> None:
    train_bpe(TEXTS, 300)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_bad_training_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes("Käse".encode("latin-1"))
    for texts, message in (
        ("one text", "iterable of texts"),
        (["fine", b"\xff"], "training text 1: text is not UTF-8"),
        ([tmp_path / "latin1.txt"], r"training file .*latin1.txt: text is not UTF-8: byte 0xe4 at offset 1"),
        ([tmp_path / "none.txt"], "cannot read training file"),
        ([3], "got int"),
    ):
        with pytest.raises(InputError, match=message):
            train_bpe(texts, 300)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least 278"):
        train_bpe(TEXTS, 277)


def test_saved_settings_say_what_was_trained(trained: ByteLevelBPE, tmp_path: Path) -> None:
    trained.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "Qwen2Tokenizer"
    assert config["eos_token"] == config["pad_token"] == "<|endoftext|>"
    flags = {token["content"]: token["special"] for token in config["added_tokens_decoder"].values()}
    assert flags == {token.content: token.special for token in CONTROL_TOKENS}
