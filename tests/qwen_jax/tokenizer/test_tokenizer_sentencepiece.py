"""SentencePiece models behind the same interface, against the sentencepiece library itself."""

import io
import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import CONTROL_TOKENS, SentencePieceTokenizer, load_tokenizer, train_sentencepiece
from qwen_jax.tokenizer.files import Settings

TEXTS = [Path(__file__).read_text(), "der Fuchs springt über den Hund, 12345 mal. " * 20, "今日は良い天気ですね。" * 9]
FLAGS = list(itertools.product([False, True], repeat=2))


@cache
def trained(model_type: str) -> SentencePieceTokenizer:
    return train_sentencepiece(TEXTS, 600, model_type=model_type)  # type: ignore[arg-type]


@cache
def foreign(dummy_prefix: bool, remove_spaces: bool, byte_fallback: bool = True) -> bytes:
    """A model as others make them, with its own control tokens."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(TEXTS).split("\n")),
        model_writer=model,
        vocab_size=500,
        model_type="bpe",
        byte_fallback=byte_fallback,
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=remove_spaces,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["\u2581"] if remove_spaces else [],
        minloglevel=2,
    )
    return model.getvalue()


@cache
def foreign_pair(dummy_prefix: bool, remove_spaces: bool) -> tuple[SentencePieceTokenizer, Any]:
    model = foreign(dummy_prefix, remove_spaces)
    engine = sentencepiece.SentencePieceProcessor(model_proto=model)
    return SentencePieceTokenizer(model, Settings(), Path("model")), engine


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_control_tokens_follow_the_pieces(model_type: str) -> None:
    tokenizer = trained(model_type)
    assert tokenizer.vocab_size == 600
    assert [tokenizer.id_to_token(i) for i in range(578, 600)] == [token.content for token in CONTROL_TOKENS]
    assert tokenizer.special_ids == {578 + n for n, token in enumerate(CONTROL_TOKENS) if token.special}
    text = "<|im_start|>user\nhi <tool_call> <|im_end|>\n"
    ids = tokenizer.encode(text)
    assert [i for i in ids if i >= 578] == [579, 592, 580]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi <tool_call> \n"
    plain = tokenizer.encode(text, parse_special=False)
    assert max(plain) < 578
    assert tokenizer.decode(plain) == text


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=50), st.sampled_from(["bpe", "unigram"]))
def test_own_models_lose_nothing(text: str, model_type: str) -> None:
    """decode(encode(x)) is x, but for U+2581, which is SentencePiece's own sign for a space."""
    tokenizer = trained(model_type)
    for parse_special in (True, False):
        assert tokenizer.decode(tokenizer.encode(text, parse_special=parse_special)) == text.replace("\u2581", " ")


@pytest.mark.parametrize("flags", FLAGS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_decoding_equals_the_library(flags: tuple[bool, bool], data: st.DataObject) -> None:
    """For every treatment of leading spaces; bytes are left out, as the library marks each broken byte by itself."""
    tokenizer, engine = foreign_pair(*flags)
    pieces = [i for i in range(engine.get_piece_size()) if not (engine.is_byte(i) or engine.is_control(i))]
    spaces = [i for i in pieces if engine.id_to_piece(i).startswith("\u2581")]
    ids = data.draw(st.lists(st.sampled_from(spaces), max_size=3)) + data.draw(
        st.lists(st.sampled_from(pieces), max_size=8)
    )
    assert tokenizer.decode(ids) == engine.decode(ids)


@pytest.mark.parametrize("flags", FLAGS)
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_texts_go_through_as_in_the_library(flags: tuple[bool, bool], text: str) -> None:
    tokenizer, engine = foreign_pair(*flags)
    ids = tokenizer.encode(text, parse_special=False)
    assert ids == engine.encode(text)
    assert tokenizer.decode(ids) == engine.decode(ids)


def test_each_stretch_between_control_tokens_is_a_text() -> None:
    tokenizer, engine = foreign_pair(True, False)
    text = "<|im_start|>user<|im_end|> der Hund"
    expected = [tokenizer.token_to_id("<|im_start|>"), *engine.encode("user"), tokenizer.token_to_id("<|im_end|>")]
    assert tokenizer.encode(text) == expected + engine.encode(" der Hund")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_models_own_control_tokens_are_special() -> None:
    tokenizer, engine = foreign_pair(True, False)
    own = {engine.bos_id(), engine.eos_id()}
    assert own < tokenizer.special_ids
    assert tokenizer.decode([*own, 300], skip_special_tokens=True) == tokenizer.decode([300])
    assert tokenizer.decode(tokenizer.encode("<s>der</s>")) == "<s>der</s>"


def test_a_model_that_holds_control_tokens_keeps_their_ids(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[0].split("\n")),
        model_writer=model,
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        control_symbols=["<|endoftext|>", "<|im_end|>"],
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 520
    assert tokenizer.token_to_id("<|im_end|>") == 4
    assert tokenizer.encode("<|im_end|><tool_call>") == [4, 500 + 12]
    assert tokenizer.decode([4, 512]) == "<|im_end|><tool_call>"


def test_broken_bytes_become_replacement_characters() -> None:
    tokenizer = trained("bpe")
    byte = {tokenizer.token_bytes(i): i for i in range(1, 257)}
    ids = [byte[bytes([b])] for b in "é".encode() + b"\xe4\xb8" + b"A"]
    assert tokenizer.decode(ids) == "é\ufffdA"


def test_save_and_load_is_the_same_tokenizer(tmp_path: Path) -> None:
    tokenizer = trained("unigram")
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, SentencePieceTokenizer)
    assert again.fingerprint() == tokenizer.fingerprint() != trained("bpe").fingerprint()
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
    assert (again.eos_id, again.pad_id, again.chat_template.source()) == (578, 578, tokenizer.chat_template.source())
    assert again.encode_batch(TEXTS) == [again.encode(text) for text in TEXTS]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_repeats(model_type: str) -> None:
    again = train_sentencepiece(iter(TEXTS), 600, model_type=model_type)  # type: ignore[arg-type]
    assert again.fingerprint() == trained(model_type).fingerprint()


def test_long_lines_are_learnt_from() -> None:
    tokenizer = train_sentencepiece(["zyxw " * 5000], 290)
    assert len(tokenizer.encode("zyxw zyxw")) < 9


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot train 9000 ids"):
        train_sentencepiece(["short"], 9000)
    with pytest.raises(InputError, match="cannot train 200 ids"):
        train_sentencepiece(TEXTS, 200)
    with pytest.raises(InputError, match="cannot train 600 ids"):
        train_sentencepiece([], 600)
    with pytest.raises(InputError, match="training text 1: text is not UTF-8"):
        train_sentencepiece(["fine", b"\xff"], 600)
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(InputError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(InputError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)
    trained("bpe").save(tmp_path)
    with pytest.raises(InputError, match="token id 600 "):
        load_tokenizer(tmp_path).decode([600])
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"5": {"content": "<|endoftext|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="special tokens clash"):
        load_tokenizer(tmp_path)


def test_unknown_piece_shows_as_in_the_library() -> None:
    model = foreign(True, False, byte_fallback=False)
    engine = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = SentencePieceTokenizer(model, Settings(), Path("model"))
    for text in ("ab\U0001f600cd", "\U0001f600"):
        ids = tokenizer.encode(text)
        assert engine.unk_id() in ids
        assert tokenizer.decode(ids) == engine.decode(ids)
