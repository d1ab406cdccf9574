"""The tokenizer in a GGUF file gives the ids of the one that it was written from."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.gguf.writer import _write_header
from qwen_jax.errors import InputError
from qwen_jax.gguf.header import Header
from qwen_jax.tokenizer import load_tokenizer
from qwen_jax.tokenizer.bpe import ByteLevelBPE
from qwen_jax.tokenizer.gguf import from_gguf, to_gguf
from tests.convert.gguf.files import tokenizer
from tests.qwen_jax.tokenizer.test_tokenizer import CORPUS, hand_written_config, tiktoken_path


def written(tok: ByteLevelBPE, rows: int, **changes: Any) -> Header:
    """The header of a file with a tokenizer, as it would be read."""
    metadata = {**to_gguf(tok, rows), "tokenizer.ggml.eos_token_id": tok.eos_id}
    metadata |= {f"tokenizer.{key.replace('__', '.')}": value for key, value in changes.items()}
    kinds = metadata.get("tokenizer.ggml.token_type")
    if isinstance(kinds, list):
        metadata["tokenizer.ggml.token_type"] = np.array(kinds, np.int32)
    return Header(Path("model.gguf"), {key: value for key, value in metadata.items() if value is not None}, {})


def test_the_published_vocabulary_has_the_same_ids(tmp_path: Path) -> None:
    """Texts of many scripts with control tokens, through a file; its embedding has more rows than there are tokens."""
    shutil.copy(tiktoken_path(), tmp_path / "qwen.tiktoken")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(hand_written_config()))
    original = load_tokenizer(tmp_path)
    assert isinstance(original, ByteLevelBPE)
    metadata = {"qwen2.block_count": 1, "tokenizer.ggml.eos_token_id": original.eos_id, **to_gguf(original, 151936)}
    _write_header(tmp_path / "model.gguf", metadata, [], {}, {})
    tok = load_tokenizer(tmp_path / "model.gguf")
    for text in CORPUS:
        for parse_special in (True, False):
            expected = original.encode(text, parse_special=parse_special)
            assert tok.encode(text, parse_special=parse_special) == expected
    assert tok.fingerprint() == original.fingerprint()
    assert (tok.eos_id, tok.pad_id, tok.vocab_size) == (151645, 151643, 151665)
    chat = [{"role": "user", "content": "hello"}]
    assert tok.encode_chat(chat) == original.encode_chat(chat)


def test_a_trained_tokenizer_is_the_same_in_a_file_and_in_a_folder(tmp_path: Path) -> None:
    tok = tokenizer()
    again = from_gguf(written(tok, 320))
    again.save(tmp_path)
    for other in (again, load_tokenizer(tmp_path)):
        assert other.fingerprint() == tok.fingerprint()
        assert (other.eos_id, other.pad_id, other.special_ids) == (tok.eos_id, tok.pad_id, tok.special_ids)
    assert to_gguf(again, 320) == to_gguf(tok, 320)


def test_rows_without_a_token_are_no_tokens() -> None:
    """As converters of today write them, and as they did in the time of Qwen1.5."""
    tok = tokenizer()
    header = written(tok, 330)
    kinds = header.metadata["tokenizer.ggml.token_type"]
    assert (kinds[tok.vocab_size :] == 5).all()
    kinds[tok.vocab_size :] = 4
    assert from_gguf(header).vocab_size == tok.vocab_size


def test_templates_by_name_are_kept(tmp_path: Path) -> None:
    tokenizer().save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    templates = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": templates}))
    tok = load_tokenizer(tmp_path)
    assert isinstance(tok, ByteLevelBPE)
    assert from_gguf(written(tok, 320)).tables()[3].chat_templates() == {"default": "d", "tool_use": "t"}
    assert from_gguf(written(tok, 320, chat_template=None)).tables()[3].chat_templates() == {"tool_use": "t"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ggml__model": "llama"}, "tokenizer of kind 'llama'"),
        ({"ggml__pre": "gpt-2"}, "splits texts as 'gpt-2'"),
        ({"ggml__model": "none"}, "holds no tokenizer"),
        ({"ggml__tokens": None}, "expected tokenizer.ggml.tokens"),
        ({"ggml__token_type": np.ones(3, np.int32)}, "expected tokenizer.ggml.tokens with a"),
        ({"ggml__token_type": np.full(320, 6, np.int32)}, "tokens of the types"),
        ({"ggml__merges": ["a"]}, "has 'a'; expected two tokens"),
        ({"ggml__merges": ["a zzzz"]}, "expected two tokens"),
        ({"ggml__eos_token_id": 400}, "eos_token_id is 400"),
        ({"ggml__tokens": [str(i) for i in range(320)]}, "not a byte-level vocabulary"),
        ({"chat_templates": "x"}, "must be a list"),
    ],
)
def test_damaged_metadata_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        from_gguf(written(tokenizer(), 320, **changes))


def test_tokenizers_that_llama_cpp_reads_otherwise_are_refused(tmp_path: Path) -> None:
    tok = tokenizer()
    with pytest.raises(InputError, match="embedding 300 rows"):
        to_gguf(tok, 300)
    tok.save(tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    document["normalizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    other = load_tokenizer(tmp_path)
    assert isinstance(other, ByteLevelBPE)
    with pytest.raises(InputError, match="in another way than Qwen2's"):
        to_gguf(other, 320)
