"""Tokenizer folders: read and written as transformers reads and writes them, and refused where they are damaged."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import (
    ByteLevelBPE,
    SentencePieceTokenizer,
    StreamDecoder,
    Tokenizer,
    default_chat_template,
    load_tokenizer,
    train_bpe,
    train_sentencepiece,
)
from tests.helpers import transformers4
from tests.qwen_jax.tokenizer.test_tokenizer import CONTROL, CORPUS, real, tiktoken_path

LOADER = """
import json, sys
from transformers import AutoTokenizer, __version__
texts = json.load(open(sys.argv[1]))
result = {"version": __version__}
for folder in sys.argv[2:]:
    t = AutoTokenizer.from_pretrained(folder)
    ids = [t.encode(x) for x in texts]
    t.save_pretrained(folder + "-resaved")
    result[folder] = [len(t), t.eos_token, t.pad_token, t.model_max_length, t.chat_template, ids,
                      [t.decode(i, skip_special_tokens=True) for i in ids]]
json.dump(result, open(sys.argv[1] + ".out", "w"))
"""


def loaded_from_dialect_5(folder: Path) -> Tokenizer:
    """A folder as transformers 5 writes it, with keys that transformers 4 cannot read."""
    train_bpe(CORPUS, 350).save(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]
    (folder / "chat_template.jinja").write_text(config.pop("chat_template"))
    config["extra_special_tokens"] = config.pop("additional_special_tokens")
    config.update(backend="tokenizers", is_local=True, tokenizer_class="TokenizersBackend")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


@pytest.mark.parametrize("major", ["4", "5"])
def test_saved_folder_loads_in_transformers_and_back(major: str, tmp_path: Path) -> None:
    """Both versions read what we save with our ids, and we read what they save as the tokenizer it was."""
    folders: dict[Path, Tokenizer] = {
        tmp_path / "real": real(),
        tmp_path / "trained": train_bpe(CORPUS * 3, 400),
        tmp_path / "from 5": loaded_from_dialect_5(tmp_path / "dialect 5"),
        tmp_path / "sentencepiece": train_sentencepiece(CORPUS * 3, 700),
    }
    for folder, tokenizer in folders.items():
        tokenizer.save(folder)
    (tmp_path / "texts").write_text(json.dumps(CORPUS))
    environment = transformers4.environment() if major == "4" else {**os.environ}
    command = [sys.executable, "-c", LOADER, str(tmp_path / "texts"), *map(str, folders)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "texts.out").read_text())
    assert result["version"].startswith(major + ".")
    for folder, tokenizer in folders.items():
        ids = tokenizer.encode_batch(CORPUS)
        shown = [tokenizer.decode(i, skip_special_tokens=True) for i in ids]
        fixed = ["<|endoftext|>", "<|endoftext|>", 131072, default_chat_template()]
        assert result[str(folder)] == [tokenizer.vocab_size, *fixed, ids, shown]
        if isinstance(tokenizer, SentencePieceTokenizer):
            continue  # transformers saves it in a form of its own.
        again = load_tokenizer(f"{folder}-resaved")
        assert again.fingerprint() == tokenizer.fingerprint()


def small() -> ByteLevelBPE:
    return train_bpe(CORPUS, 320)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_out(path: Path, key: str) -> None:
    content = json.loads(path.read_text())
    del content[key]
    path.write_text(json.dumps(content))


def special_piece(token: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": 0}}


def template_processing(single: list[dict[str, Any]]) -> dict[str, Any]:
    """A post-processor of tokenizer.json, for the control tokens of `small`."""
    used = [piece["SpecialToken"]["id"] for piece in single if "SpecialToken" in piece]
    ids = {token: small().token_to_id(token) for token in used}
    special = {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in ids.items()}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}


TEXT_PIECE = {"Sequence": {"id": "A", "type_id": 0}}


@pytest.mark.parametrize(
    "pieces",
    [
        [special_piece("<|im_start|>"), TEXT_PIECE],
        [TEXT_PIECE, special_piece("<|endoftext|>")],
        [special_piece("<|im_start|>"), special_piece("<tool_call>"), TEXT_PIECE, special_piece("<|endoftext|>")],
    ],
    ids=["bos", "eos", "both"],
)
def test_a_post_processor_adds_what_it_adds_in_transformers(pieces: list[dict[str, Any]], tmp_path: Path) -> None:
    """As loaded and as saved again; one by one and in batches; never in a chat, whose template has these tokens."""
    small().save(tmp_path)
    edit(tmp_path / "tokenizer.json", post_processor=template_processing(pieces))
    load_tokenizer(tmp_path).save(tmp_path / "again")
    hf = AutoTokenizer.from_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "again"):
        tokenizer = load_tokenizer(folder)
        expected = [hf.encode(text) for text in CORPUS]
        assert tokenizer.encode_batch(CORPUS) == [tokenizer.encode(text) for text in CORPUS] == expected
        bare = [hf.encode(text, add_special_tokens=False) for text in CORPUS]
        assert tokenizer.encode_batch(CORPUS, add_special_tokens=False) == bare
        messages = [{"role": "user", "content": "hi"}]
        chat = hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert tokenizer.encode_chat(messages) == chat
        documents = tokenizer.encode_documents(["one", "two <|im_end|>"])
        assert all(document[-1] == tokenizer.eos_id != document[-2] for document in documents)
        assert tokenizer.fingerprint() != small().fingerprint()


@pytest.mark.parametrize(
    "flags", [{}, {"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}], ids=str
)
@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json", "tokenizer.model"])
def test_add_bos_token_counts_where_no_tokenizer_json_has_rules(
    form: str, flags: dict[str, bool], tmp_path: Path
) -> None:
    tokenizer = train_sentencepiece(CORPUS * 3, 700) if form == "tokenizer.model" else small()
    tokenizer.save(tmp_path)
    edit(tmp_path / "tokenizer_config.json", bos_token="<|im_start|>", **flags)
    if form == "vocab.json":
        (tmp_path / "tokenizer.json").unlink()
    hf = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a text", "two\nlines"):
        assert load_tokenizer(tmp_path).encode(text) == hf.encode(text)


def test_tokens_of_older_files_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    """added_tokens.json and special_tokens_map.json beside vocab.json and merges.txt, without added_tokens_decoder."""
    small().save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    first = small().vocab_size - len(CONTROL)
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<extra>", "čaj"]
    (tmp_path / "added_tokens.json").write_text(json.dumps({token: first + n for n, token in enumerate(names)}))
    for key in ("added_tokens_decoder", "eos_token", "additional_special_tokens"):
        edit_out(tmp_path / "tokenizer_config.json", key)
    older = {"eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": ["<|im_start|>"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(older))
    tokenizer, hf = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.vocab_size == len(hf) == first + len(names)
    assert tokenizer.id_to_token(tokenizer.eos_id) == hf.eos_token == "<|im_end|>"
    text = "a<|im_start|>b <extra> c<|im_end|>d<|endoftext|>"
    ids = tokenizer.encode(text)
    assert ids == hf.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == hf.decode(ids, skip_special_tokens=True)
    tokenizer.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").fingerprint() == tokenizer.fingerprint()


def test_flags_of_tokenizer_json_win_over_added_tokens_json(tmp_path: Path) -> None:
    small().save(tmp_path)
    edit_out(tmp_path / "tokenizer_config.json", "added_tokens_decoder")
    (tmp_path / "added_tokens.json").write_text(
        json.dumps({"<tool_call>": small().token_to_id("<tool_call>"), "<new>": small().vocab_size})
    )
    tokenizer, hf = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "<tool_call> <new>"
    assert tokenizer.encode(text) == hf.encode(text)
    assert tokenizer.special_ids == small().special_ids


@pytest.mark.parametrize("skip", [False, True])
def test_added_tokens_of_latin_letters_decode_to_themselves(skip: bool, tmp_path: Path) -> None:
    """Their letters are also in the alphabet that stands for bytes; transformers takes them for bytes."""
    words = ["č", "café", "đem", "Ġx", "naïve ü", "日本"]
    small().save(tmp_path)
    hf = AutoTokenizer.from_pretrained(tmp_path)
    hf.add_tokens(words)
    hf.save_pretrained(tmp_path / "added")
    tokenizer = load_tokenizer(tmp_path / "added")
    for word in words:
        text = f"a {word} b{word}"
        ids = tokenizer.encode(text)
        assert tokenizer.token_to_id(word) in ids
        assert tokenizer.decode(ids, skip_special_tokens=skip) == text
        stream = StreamDecoder(tokenizer, skip_special_tokens=skip)
        assert "".join(stream.push([i]) for i in ids) + stream.flush() == text
        assert tokenizer.token_bytes(tokenizer.encode(word)[0]) == word.encode()


def test_padding_falls_back_to_the_end_token(tmp_path: Path) -> None:
    """A vocabulary without `<|endoftext|>` needs no pad token of its own."""
    base = small()
    base.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    first = base.vocab_size - len(CONTROL)
    added = {str(first): {"content": "</s>", "special": True}}
    edit(tmp_path / "tokenizer_config.json", added_tokens_decoder=added, eos_token="</s>", pad_token=None)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_id == tokenizer.eos_id == first
    with pytest.raises(InputError, match=r"no <\|im_start\|>"):
        _ = tokenizer_without_template(tmp_path).chat_template


def tokenizer_without_template(folder: Path) -> Tokenizer:
    edit_out(folder / "tokenizer_config.json", "chat_template")
    return load_tokenizer(folder)


def test_settings_of_the_folder_are_kept(tmp_path: Path) -> None:
    small().save(tmp_path)
    edit(
        tmp_path / "tokenizer_config.json",
        eos_token={"content": "<|im_end|>", "special": True},
        pad_token="<|fim_pad|>",
        model_max_length=77,
        own_key=[1],
    )
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    for _ in range(2):  # As loaded, and as saved again over itself.
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.id_to_token(tokenizer.eos_id) == "<|im_end|>"
        assert tokenizer.id_to_token(tokenizer.pad_id) == "<|fim_pad|>"
        assert tokenizer.chat_template.source() == "{{ messages[0].content }}"
        tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["model_max_length"], config["own_key"]) == (77, [1])
    assert config["chat_template"] == "{{ messages[0].content }}"


def test_a_stale_template_file_does_not_outlive_a_save(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("old")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("old, with tools")
    small().save(tmp_path)
    assert load_tokenizer(tmp_path).chat_template.sources == {"default": default_chat_template()}


def test_fingerprint_sees_merges_control_tokens_and_splitting(tmp_path: Path) -> None:
    base = small()
    seen = {base.fingerprint()}
    document = json.loads(base._engine.to_str())
    changes = []
    fewer = json.loads(json.dumps(document))
    fewer["model"]["merges"].pop()
    changes.append(fewer)
    renamed = json.loads(json.dumps(document))
    renamed["added_tokens"][-1]["content"] = "<|other|>"
    changes.append(renamed)
    unsplit = json.loads(json.dumps(document))
    unsplit["pre_tokenizer"]["pretokenizers"].pop(0)
    changes.append(unsplit)
    for change in changes:
        (tmp_path / "tokenizer.json").write_text(json.dumps(change))
        seen.add(load_tokenizer(tmp_path).fingerprint())
    assert len(seen) == 4


def test_another_pipeline_is_not_named_qwen2(tmp_path: Path) -> None:
    """Qwen2Tokenizer would put its own pre-tokeniser in the place of the file's."""
    small().save(tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    document["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    document["normalizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.save(tmp_path / "out")
    other = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in CORPUS:
        assert other.encode(text) == tokenizer.encode(text)
        assert other.decode(tokenizer.encode(text)) == text


def break_nothing_there(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def break_merges_missing(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "merges.txt").unlink()


def break_json(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:1000])


def break_utf8(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"{\xff}")


def break_kind(folder: Path) -> None:
    edit(folder / "tokenizer.json", model={"type": "WordPiece", "vocab": {}})


def break_engine(folder: Path) -> None:
    edit(folder / "tokenizer.json", pre_tokenizer={"type": "Nonesuch"})


def break_vocab_gap(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    vocab = json.loads((folder / "vocab.json").read_text())
    vocab["zz"] = 9999
    (folder / "vocab.json").write_text(json.dumps(vocab))


def break_vocab_bytes(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    vocab = json.loads((folder / "vocab.json").read_text())
    vocab = {("first" if token == "!" else token): i for token, i in vocab.items()}
    (folder / "vocab.json").write_text(json.dumps(vocab))


def break_merges(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "merges.txt").write_text((folder / "merges.txt").read_text() + "a nonesuch\n")


def break_control_id(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", added_tokens_decoder={"9": {"content": "<|im_end|>", "special": True}})


def break_control_flag(folder: Path) -> None:
    first = str(small().token_to_id("<tool_call>"))
    edit(folder / "tokenizer_config.json", added_tokens_decoder={first: {"content": "<tool_call>", "special": True}})


def break_control_twice(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", added_tokens_decoder={"1": {"content": "x"}, "2": {"content": "x"}})


def break_control_gap(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", added_tokens_decoder={"9999": {"content": "<|new|>"}})


def break_eos(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token="</s>")


def break_no_merges(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    del model["merges"]
    edit(folder / "tokenizer.json", model=model)


def break_post_processor(folder: Path) -> None:
    pieces = [
        {"Sequence": {"id": "A", "type_id": 0}},
        special_piece("<|im_end|>"),
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    edit(folder / "tokenizer.json", post_processor=template_processing(pieces))


def break_bos(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    edit(folder / "tokenizer_config.json", add_bos_token=True)


def break_added_tokens(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    edit_out(folder / "tokenizer_config.json", "added_tokens_decoder")
    (folder / "added_tokens.json").write_text('{"<a>": 298, "<b>": 298}')


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (break_nothing_there, "no tokenizer in .*vocab.json with merges.txt"),
        (break_merges_missing, "has no merges.txt"),
        (break_json, "tokenizer.json is not JSON"),
        (break_utf8, "not UTF-8"),
        (break_kind, "expected a byte-level BPE .*WordPiece"),
        (break_engine, "the tokenizers library cannot read it"),
        (break_vocab_gap, "ids must be 0 to"),
        (break_vocab_bytes, "1 bytes have no token"),
        (break_merges, r"merges.txt, line \d+: .*a nonesuch"),
        (break_control_id, "clash: '<|im_end|>' should have id 9"),
        (break_control_flag, "clash: id .*special=False.*special=True"),
        (break_control_twice, "two ids to 'x'"),
        (break_control_gap, "should have id 9999"),
        (break_eos, "eos token '</s>' is not in the vocabulary"),
        (break_no_merges, "the BPE model has no list of merges"),
        (break_post_processor, "expected a post-processor that adds tokens before or after"),
        (break_bos, "add_bos_token is true and bos_token is not given"),
        (break_added_tokens, "added_tokens.json: each token must have an id of its own"),
    ],
)
def test_damaged_folders_are_refused(harm, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    small().save(tmp_path)
    harm(tmp_path)
    with pytest.raises(InputError, match=message.replace("|", r"\|")):
        load_tokenizer(tmp_path)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda lines: lines[:200], "bytes have no token"),
        (lambda lines: [*lines[:-1], "not base64 7"], "line 301: expected a base64 token"),
        (lambda lines: [*lines[:-1], lines[-1].split()[0]], "line 301: expected a base64 token"),
        (lambda lines: [*lines[:-1], lines[-1].split()[0] + " 999"], "ids must be 0 to"),
        (lambda lines: [*lines[:-1], base64.b64encode(b"\x00\x01\x02\x03").decode() + " 300"], "does not follow"),
    ],
)
def test_damaged_ranks_are_refused(harm, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    lines = tiktoken_path().read_text().splitlines()[:301]
    (tmp_path / "qwen.tiktoken").write_text("\n".join(lines))
    assert load_tokenizer(tmp_path).vocab_size == 301 + 22
    (tmp_path / "qwen.tiktoken").write_text("\n".join(harm(lines)))
    with pytest.raises(InputError, match=message):
        load_tokenizer(tmp_path)


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small().save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match="No space left"):
        train_bpe(["other text"], 300).save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_saving_where_a_file_stands_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot save a tokenizer"):
        small().save(tmp_path / "file")
