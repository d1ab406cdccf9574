"""The byte-level BPE tokenizer on the real Qwen vocabulary, against transformers and against a BPE written out here."""
# ruff: noqa: RUF001 (texts in many scripts)

import base64
import hashlib
import importlib.util
import json
import math
import random
import subprocess
import sys
import threading
import time
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import (
    Tokenizer,
    load_tokenizer,
)
from tests.helpers.timing import best_rate

SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]
NOT_SPECIAL = [
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
]
CONTROL = SPECIAL + NOT_SPECIAL
FIRST_CONTROL = 151643

CORPUS = [
    "",
    " ",
    "Hello, world! It's 2025, isn't it? I'LL say: WE'VE DONE it'd.",
    "你好，世界。今天天气怎么样？",
    "こんにちは世界、東京タワーは333メートルです。",
    "안녕하세요 세계! 오늘은 2024년 5월 3일입니다.",
    "Привет, мир! Съешь ещё этих мягких французских булок.",
    "مرحبا بالعالم، كيف حالك؟ ١٢٣٤",
    "שלום עולם, מה שלומך היום?",
    "नमस्ते दुनिया, आप कैसे हैं? क्षत्रिय ज्ञान",
    "สวัสดีชาวโลก วันนี้อากาศดี",
    "Γειά σου Κόσμε, ἐν ἀρχῇ ἦν ὁ λόγος",
    "Xin chào thế giới, tiếng Việt có dấu",
    "e\u0301 a\u0308 o\u0302\u0323 \u1100\u1161\u11a8 \u212b \ufb01",
    "👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ❤️ 🤦🏻‍♀️ 😀😃",
    "def f(x: int) -> str:\n    return f'{x:>{10}}'  # comment\n\n\nclass A:\n\tpass\r\n",
    '#include <stdio.h>\nint main(){printf("%d\\n", 0x1F);}',
    "    four\n\t\ttabs \n \n\n  two  trailing   \n\n   ",
    "\r\n\r\n\n\r a\u00a0b\u2003c\u3000d\u200be\ufefff",
    "1234567890 3.14159 1e-10 ½ Ⅷ ٣ 四",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<tool_call>\n{}\n</tool_call><|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>",
    "<|endoftext|><|endoftext|> <|im_end|>x<|vision_pad|>",
    "<|im_end| > <|im_end <tool_call > <|im_|im_end|>end|>",
    "\x00\x01\x1b[0m\x7f\x85",
    "a" * 500 + " " * 300 + "\n" * 50 + "=" * 200,
]


def tiktoken_path() -> Path:
    """The published ranks, without importing the package that carries them."""
    spec = importlib.util.find_spec("dashscope")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "resources" / "qwen.tiktoken"


@cache
def real() -> Tokenizer:
    return load_tokenizer(tiktoken_path())


@cache
def ranks() -> dict[bytes, int]:
    lines = tiktoken_path().read_text().splitlines()
    return {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}


PATTERN = regex.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def slow_bpe(text: str) -> list[int]:
    """Byte-pair encoding as tiktoken defines it: join the neighbours of lowest rank until none are left."""
    ids = []
    for piece in PATTERN.findall(unicodedata.normalize("NFC", text)):
        parts = [bytes([byte]) for byte in piece.encode()]
        while len(parts) > 1:
            rank, i = min((ranks().get(parts[i] + parts[i + 1], 1 << 30), i) for i in range(len(parts) - 1))
            if rank == 1 << 30:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks()[part] for part in parts]
    return ids


def hand_written_config() -> dict:
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "model_max_length": 131072,
        "additional_special_tokens": SPECIAL[1:],
        "added_tokens_decoder": {
            str(FIRST_CONTROL + i): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": token in SPECIAL,
            }
            for i, token in enumerate(CONTROL)
        },
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    real().save(folder)
    return folder


@pytest.fixture(scope="module")
def oracle(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Qwen2Tokenizer:
    """transformers' own class and pipeline, from vocab.json and merges.txt (whose hashes are tested) alone."""
    folder = tmp_path_factory.mktemp("oracle")
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((saved / name).read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(hand_written_config()))
    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    assert len(tokenizer) == 151665
    return tokenizer


def test_vocab_and_merges_are_the_published_files(saved: Path) -> None:
    hashes = {name: hashlib.sha256((saved / name).read_bytes()).hexdigest() for name in ("vocab.json", "merges.txt")}
    assert hashes == {
        "vocab.json": "ca10d7e9fb3ed18575dd1e277a2579c16d108e32f27439684afa0e10b1440910",
        "merges.txt": "599bab54075088774b1733fde865d5bd747cbcc7a547c5bc12610e874e26f5e3",
    }


def test_control_tokens_have_their_ids_and_flags() -> None:
    tokenizer = real()
    assert tokenizer.vocab_size == 151665
    assert [tokenizer.token_to_id(token) for token in CONTROL] == list(range(FIRST_CONTROL, 151665))
    assert tokenizer.special_ids == frozenset(range(FIRST_CONTROL, FIRST_CONTROL + 14))
    for token in CONTROL:
        assert tokenizer.encode(token) == [tokenizer.token_to_id(token)]
        shown = "" if token in SPECIAL else token
        assert tokenizer.decode(tokenizer.encode(token), skip_special_tokens=True) == shown


@pytest.mark.parametrize("text", CORPUS)
def test_corpus_equals_transformers(oracle: Qwen2Tokenizer, text: str) -> None:
    ids = real().encode(text)
    assert ids == oracle.encode(text)
    assert real().decode(ids) == oracle.decode(ids) == unicodedata.normalize("NFC", text)
    assert real().decode(ids, skip_special_tokens=True) == oracle.decode(ids, skip_special_tokens=True)
    assert b"".join(real().token_bytes(i) for i in ids).decode() == real().decode(ids)


def assigned_characters() -> list[str]:
    """Characters whose class has not changed since Unicode 3.2, so that all regex libraries agree on them."""
    old = unicodedata.ucd_3_2_0
    return [
        chr(c)
        for c in range(0x2FFFF)
        if old.category(chr(c)) == unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co") and not 0x1C <= c <= 0x1F
    ]


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    characters = assigned_characters()
    ascii_text = [chr(c) for c in range(0x20, 0x7F)]
    joined = "".join(text for text in CORPUS[2:20])
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 12)):
            start = rng.randrange(len(joined))
            parts.append(
                rng.choice(
                    [
                        "".join(rng.choices(characters, k=rng.randint(1, 8))),
                        "".join(rng.choices(ascii_text, k=rng.randint(1, 20))),
                        "".join(rng.choices(" \n\r\t'\u00a0", k=rng.randint(1, 6))),
                        joined[start : start + rng.randint(1, 30)],
                        rng.choice(CONTROL),
                        rng.choice(CONTROL)[: rng.randint(1, 9)],
                    ]
                )
            )
        texts.append("".join(parts))
    return texts


def test_random_texts_equal_transformers_and_slow_bpe(oracle: Qwen2Tokenizer) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    split_at_control = regex.compile("(" + "|".join(map(regex.escape, CONTROL)) + ")")
    texts = random_texts(1500, seed)
    batch = real().encode_batch(texts)
    for text, ids in zip(texts, batch, strict=True):
        assert ids == real().encode(text), f"{seed=}"
        assert ids == oracle.encode(text), f"{seed=}"
        expected: list[int] = []
        for part in split_at_control.split(text):
            expected += [FIRST_CONTROL + CONTROL.index(part)] if part in CONTROL else slow_bpe(part)
        assert ids == expected, f"{seed=}"
        assert real().decode(ids) == oracle.decode(ids), f"{seed=}"
        plain = real().encode(text, parse_special=False)
        assert plain == slow_bpe(text), f"{seed=}"
        assert max(plain, default=0) < FIRST_CONTROL
        assert real().decode(plain) == unicodedata.normalize("NFC", text), f"{seed=}"
    assert real().encode_batch(texts, parse_special=False) == [real().encode(t, parse_special=False) for t in texts]


def test_other_threads_run_while_a_long_text_is_encoded():
    """A server encodes prompts in threads: with the interpreter's lock held, no other request would go on meanwhile."""
    text, beats, begun, ended = "hello there " * 100_000, 0, threading.Event(), threading.Event()

    def beat() -> None:
        nonlocal beats
        while not ended.is_set():
            beats += begun.is_set()
            time.sleep(1e-3)

    thread = threading.Thread(target=beat)
    tokenizer = real()
    thread.start()
    begun.set()
    tokenizer.encode(text)
    ended.set()
    thread.join()
    # One beat may fall before the call, and one after it.
    assert beats > 5, beats


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 151664), max_size=40), st.booleans())
def test_any_ids_decode_as_in_transformers(oracle: Qwen2Tokenizer, ids: list[int], skip: bool) -> None:
    assert real().decode(ids, skip_special_tokens=skip) == oracle.decode(ids, skip_special_tokens=skip)


def test_bytes_and_numpy_ids_are_accepted() -> None:
    ids = real().encode("naïve 日本".encode())
    assert ids == real().encode("naïve 日本")
    assert real().decode(np.asarray(ids, np.int32)) == "naïve 日本"


@pytest.mark.parametrize("token_id", [-1, 151665, 151935, 152063])
def test_ids_outside_the_vocabulary_are_named(token_id: int) -> None:
    with pytest.raises(InputError, match=f"token id {token_id} "):
        real().decode([9707, token_id])
    with pytest.raises(InputError, match=f"token id {token_id} "):
        real().token_bytes(token_id)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"ab\xff", "byte 0xff at offset 2"),
        (b"\xe4\xb8", "offset 0"),
        ("ab\ud800c", r"U\+D800 at character 2"),
        (17, "got int"),
    ],
)
def test_text_that_is_not_unicode_is_refused(text: object, message: str) -> None:
    for call in (real().encode, lambda t: real().encode_batch([t]), lambda t: real().encode(t, parse_special=False)):
        with pytest.raises(InputError, match=message):
            call(text)  # type: ignore[arg-type]


def test_every_form_is_the_same_tokenizer(saved: Path, tmp_path: Path) -> None:
    prints = {name: load_tokenizer(saved / name).fingerprint() for name in ("tokenizer.json", "vocab.json")}
    assert set(prints.values()) == {real().fingerprint()}
    (tmp_path / "vocab.json").write_bytes((saved / "vocab.json").read_bytes())
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + (saved / "merges.txt").read_text())
    from_pair = load_tokenizer(tmp_path)
    assert from_pair.fingerprint() == real().fingerprint()
    assert from_pair.encode(CORPUS[20]) == real().encode(CORPUS[20])


def test_loading_the_real_vocabulary_takes_about_as_long_as_in_transformers() -> None:
    """1.2 times as long on a quiet machine; transformers does not check that the ranks follow from each other."""
    converter = TikTokenConverter(vocab_file=str(tiktoken_path()))
    theirs = best_rate(1, lambda _: converter.converted(), math.inf, attempts=1)
    assert best_rate(1, lambda _: load_tokenizer(tiktoken_path()), theirs / 2) > theirs / 2


def test_import_leaves_jax_alone() -> None:
    code = "import sys, qwen_jax.tokenizer; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3]).returncode == 0
