"""`generate`, `chat` and `tokenize`: how prompts and models are given, what ends a text, and what is found early."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwen_jax.cli import main
from qwen_jax.tokenizer import load_tokenizer
from tests.helpers.scripted import TURN_END, A, B, C, edit_json, make_scripted

Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *argv: Any, stdin: bytes = b"") -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        status = main([str(x) for x in argv])
    return (status, *capsys.readouterr())


def results(capsys: Capture, *argv: Any, stdin: bytes = b"") -> list[dict[str, Any]]:
    status, out, _ = run(capsys, "generate", *argv, "--json", stdin=stdin)
    assert status == 0
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text after "a" is "b<|im_end|>cccc…"."""
    return make_scripted(tmp_path_factory.mktemp("model"), {A: B, B: TURN_END, TURN_END: C, C: C})


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts that come to "b" find NaN."""
    folder = make_scripted(tmp_path_factory.mktemp("broken"), {A: B, B: C, C: C})
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][B] = np.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# --- the model and the prompts ---


def test_the_model_is_the_first_argument_or_an_option(capsys: Capture, folder: Path) -> None:
    rest = ("--prompt", "a", "--max-new-tokens", "3")
    expected = run(capsys, "generate", "--model", folder, *rest)
    assert expected[:2] == (0, "bc\n")
    assert run(capsys, "generate", folder, *rest)[:2] == expected[:2]
    assert run(capsys, "generate", *rest, folder)[:2] == expected[:2]
    assert run(capsys, "tokenize", folder, stdin=b"ab\n") == (0, "[64,65]\n", "")
    assert run(capsys, "chat", folder, "--max-new-tokens", "1", stdin=b"\n")[0] == 0
    for argv in (("generate", *rest), ("generate", folder, "--model", folder, *rest), ("tokenize",), ("chat",)):
        status, _, err = run(capsys, *argv)
        assert (status, "Give the model once" in err) == (1, True)


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_prompt_files_by_line_or_whole(
    capsys: Capture, folder: Path, tmp_path: Path, bom: bytes, end: bytes, last: bool
) -> None:
    """A byte order mark and the kind of line ends change nothing, and neither does the end of the last line."""
    text = bom + b"a b" + end + b"c\rd" + (end if last else b"")
    path = tmp_path / "prompts.txt"
    path.write_bytes(text)
    tokenizer = load_tokenizer(folder)

    def prompts(*argv: Any, stdin: bytes = b"") -> list[str]:
        found = results(capsys, folder, "--max-new-tokens", "1", *argv, stdin=stdin)
        return [tokenizer.decode(one["prompt_token_ids"]) for one in found]

    assert prompts("--prompt-file", path) == ["a b", "c\rd"]
    assert prompts("--prompt-file", "-", stdin=text) == ["a b", "c\rd"]
    assert prompts("--prompt-file", path, "--prompt-per", "file") == ["a b\nc\rd"]
    assert prompts("--prompt-file", path, "--prompt-file", path, "--prompt-per", "file") == ["a b\nc\rd"] * 2
    ids = [tokenizer.encode(line) for line in ("a b", "c\rd")]
    _, out, _ = run(capsys, "tokenize", folder, stdin=text)
    assert [json.loads(line) for line in out.splitlines()] == ids
    lines = bom + end.join(json.dumps(i).encode() for i in ids) + (end if last else b"")
    assert run(capsys, "tokenize", folder, "--decode", stdin=lines)[1] == "a b\nc\rd\n"


@pytest.mark.parametrize(
    ("content", "argv", "message"),
    [
        (b"", (), "is empty. Expected one prompt on each line"),
        (b"\n", (), "is empty"),
        (b"\xef\xbb\xbf\r\n", ("--prompt-per", "file"), "is empty. Expected a prompt"),
        (b"a\n\nb\n", (), "line 2 is empty"),
        (b"a\n\xff\n", (), "line 2 is not UTF-8"),
        (b"a\n\xff\n", ("--prompt-per", "file"), "is not UTF-8"),
    ],
)
def test_prompt_files_without_prompts(
    capsys: Capture, folder: Path, tmp_path: Path, content: bytes, argv: tuple[str, ...], message: str
) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    status, out, err = run(capsys, "generate", folder, "--prompt-file", tmp_path / "prompts.txt", *argv)
    assert (status, out) == (1, "")
    assert message in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("generate", "--prompt", "a", "--document", "{tmp}"), "is a folder"),
        (("generate", "--prompt-file", "-", "--document", "-"), "can be read once"),
        (("generate", "--prompt-file", "-", "--prompt-file", "-"), "can be read once"),
        (("chat", "--document", "-"), "Give --document a file"),
        (("chat", "--document", "{tmp}/long.txt"), "The document and what is before it have"),
    ],
    ids=str,
)
def test_documents_that_cannot_be_read_are_found_before_the_weights_are_loaded(
    capsys: Capture, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], message: str
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr("convert.load", load)
    (tmp_path / "long.txt").write_text("a" * 600)
    argv = tuple(word.format(tmp=tmp_path) for word in argv)
    status, out, err = run(capsys, argv[0], folder, *argv[1:], stdin=b"a\n")
    assert (status, out) == (1, "")
    assert message in err


@pytest.mark.parametrize("program", ["read_layer", "decoder"])
def test_a_chat_about_a_document_goes_on_after_ctrl_c(
    capsys: Capture, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    """Wherever Ctrl-C comes, also between a program that takes the buffers of the cache and what it returns."""
    from qwen_jax.inference import chunked_prefill, engine

    (tmp_path / "document.txt").write_text("ab" * 20)
    reads: list[Any] = []
    hits: list[bool] = []
    read = engine.Engine.read

    def noting(self: Any, *args: Any, **how: Any) -> Any:
        document = read(self, *args, **how)
        reads.append(document)
        return document

    def interrupted(run: Any) -> Any:
        def program(*args: Any, **how: Any) -> Any:
            results = run(*args, **how)
            if reads and not hits:
                hits.append(True)
                raise KeyboardInterrupt
            return results

        return program

    monkeypatch.setattr(engine.Engine, "read", noting)
    if program == "decoder":
        decoder = engine.decoder
        monkeypatch.setattr(engine, "decoder", lambda *args: interrupted(decoder(*args)))
    else:
        monkeypatch.setattr(chunked_prefill, "read_layer", interrupted(chunked_prefill.read_layer))
    options = ("--document", tmp_path / "document.txt", "--max-new-tokens", "3", "--temperature", "0")
    status, out, err = run(capsys, "chat", folder, *options, stdin=b"a\n/reset\na\n")
    assert (status, len(reads), len(hits)) == (0, 2, 1), err
    assert "read again" in err
    _, plain, _ = run(capsys, "chat", folder, *options, stdin=b"a\n")
    assert out == "\n" + plain


# --- what ends a text ---


def test_end_ids_by_option(capsys: Capture, folder: Path, tmp_path: Path) -> None:
    ask = (folder, "--prompt", "a", "--max-new-tokens", "5")
    assert results(capsys, *ask)[0]["finish_reason"] == "length"
    for argv in (("--stop-token-ids", f"7,{TURN_END}"), ("--stop", "<|im_end|>"), ("--stop-token-ids", TURN_END)):
        (one,) = results(capsys, *ask, *argv)
        assert (one["token_ids"], one["text"], one["finish_reason"]) == ([B, TURN_END], "b", "stop")
    ends = make_scripted(tmp_path, {A: B, B: TURN_END, TURN_END: C, C: C})
    edit_json(ends / "tokenizer_config.json", eos_token="<|im_end|>")
    ask = (ends, *ask[1:])
    assert results(capsys, *ask)[0]["token_ids"] == [B, TURN_END]
    assert results(capsys, *ask, "--ignore-eos")[0]["finish_reason"] == "length"
    assert results(capsys, *ask, "--ignore-eos", "--stop-token-ids", C)[0]["token_ids"] == [B, TURN_END, C]


def test_max_length_of_generation_config_is_honoured(capsys: Capture, tmp_path: Path) -> None:
    folder = make_scripted(tmp_path, {A: B, B: C, C: C})
    edit_json(folder / "generation_config.json", max_length=8)
    assert len(results(capsys, folder, "--prompt-ids", "64,65,66")[0]["token_ids"]) == 5
    assert len(results(capsys, folder, "--prompt-ids", "64,65,66", "--max-new-tokens", "9")[0]["token_ids"]) == 9
    status, _, err = run(capsys, "generate", folder, "--prompt", "a" * 8)
    assert (status, "max_length=8" in err) == (1, True)


# --- logits that are not finite ---


def test_logits_that_are_not_finite_are_an_error_in_strict_json(capsys: Capture, broken: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    argv = ("generate", broken, "--prompt", "a", "--prompt", "c", "--max-new-tokens", "4", "--json", "--logprobs")
    status, out, err = run(capsys, *argv)
    lost, kept = (json.loads(line, parse_constant=refuse) for line in out.splitlines())
    assert status == 1
    assert "prompt 0: The model's logits after 1 new tokens are not finite" in err
    assert (lost["finish_reason"], lost["token_ids"], len(lost["logprobs"])) == ("error", [B], 1)
    assert (kept["finish_reason"], kept["error"]) == ("length", None)
    status, out, err = run(capsys, "generate", broken, "--prompt", "a")
    assert (status, out, err.count("not finite")) == (1, "b\n", 1)
    status, out, err = run(capsys, "chat", broken, "--stop", "never", stdin=b"a\nb\n")
    assert (status, err.count("not finite")) == (1, 2)


def test_float16_that_overflows_advises_bfloat16(capsys: Capture, tmp_path: Path) -> None:
    folder = make_scripted(tmp_path, {A: B, B: C, C: C})
    weights = load_file(folder / "model.safetensors")
    for name in ("gate", "up"):
        weights[f"model.layers.0.mlp.{name}_proj.weight"][:] = 1e4
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ask = ("generate", folder, "--prompt", "a", "--max-new-tokens", "2")
    assert run(capsys, *ask)[:2] == (0, "bc\n")
    status, _, err = run(capsys, *ask, "--dtype", "float16")
    assert (status, "use bfloat16 (--dtype bfloat16)" in err) == (1, True)


# --- found early ---


@pytest.mark.parametrize(
    "argv",
    [
        ("generate", "--prompt", "a", "--temperature", "-1"),
        ("generate", "--prompt", "a", "--top-k", "-2"),
        ("generate", "--prompt", "a", "--top-p", "1.5"),
        ("generate", "--prompt", "a", "--seed", "-1"),
        ("generate", "--prompt", "a", "--max-new-tokens", "0"),
        ("generate", "--prompt", "a", "--mesh", "tensors=2"),
        ("generate", "--prompt", "a", "--mesh", "tensor=64"),
        ("generate", "--prompt", "a", "--stop", ""),
        ("generate", "--prompt", "a", "--stop-token-ids", "x"),
        ("generate", "--prompt", "a", "--batch-size", "0"),
        ("generate", "--prompt-ids", "1,x"),
        ("generate", "--prompt-file", "nowhere.txt"),
        ("generate",),
        ("chat", "--min-p", "2"),
        ("chat", "--repetition-penalty", "0"),
        ("chat", "--model", "another/one"),
        ("tokenize", "--model", "another/one"),
    ],
    ids=" ".join,
)
def test_wrong_options_are_found_before_anything_is_downloaded(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...]
) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise AssertionError("downloaded")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    status, out, err = run(capsys, argv[0], "someone/Some-Model", *argv[1:])
    assert (status, out) == (1, "")
    assert err.startswith("qwen-jax: error: ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("generate", "--prompt", "a", "--stop-token-ids", "320"), "--stop-token-ids has 320"),
        (("generate", "--prompt-ids", "278"), "Prompt 0 has token id 278"),
        (("generate", "--prompt", "a", "--max-new-tokens", "600"), "context of 512"),
        (("generate", "--prompt", "a" * 600), "exceed"),
        (("generate", "--prompt", "a", "--mesh", "tensor=3"), "not divisible"),
        (("chat", "--system", "s"), "no system message, please"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_the_model_are_found_before_its_weights_are_loaded(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], message: str
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("loaded")

    folder = make_scripted(tmp_path, {A: B})
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message, please') }}{% endif %}"
    edit_json(folder / "tokenizer_config.json", chat_template=refusing)
    monkeypatch.setattr("convert.load", load)
    status, out, err = run(capsys, argv[0], folder, *argv[1:])
    assert (status, out) == (1, "")
    assert message in err


@pytest.mark.parametrize("template", [[{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}], 3])
def test_generate_and_tokenize_need_no_template(capsys: Capture, tmp_path: Path, template: Any) -> None:
    folder = make_scripted(tmp_path, {A: B, B: C})
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    assert run(capsys, "generate", folder, "--prompt", "a", "--max-new-tokens", "2")[:2] == (0, "bc\n")
    assert run(capsys, "tokenize", folder, stdin=b"a\n")[1] == "[64]\n"
    status, _, err = run(capsys, "chat", folder, "--max-new-tokens", "2", stdin=b"a\n")
    assert (status, "chat_template must be" in err) == ((1, True) if template == 3 else (0, False))


def test_a_top_k_beyond_every_vocabulary_keeps_all(capsys: Capture, folder: Path) -> None:
    ask = (folder, "--prompt", "a", "--temperature", "1", "--max-new-tokens", "6", "--seed", "5")
    assert results(capsys, *ask, "--top-k", "3000000000") == results(capsys, *ask, "--top-k", "0")


def test_chat_draws_a_new_seed_each_turn_unless_one_is_given(
    capsys: Capture, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_jax.inference import Engine

    seeds: list[int] = []
    stream = Engine.stream

    def noting(self: Engine, prompt: Any, sampling: Any, **rest: Any) -> Any:
        seeds.append(sampling.seed)
        return stream(self, prompt, sampling, **rest)

    monkeypatch.setattr(Engine, "stream", noting)
    ask = ("chat", folder, "--temperature", "1", "--max-new-tokens", "2")
    for _ in range(2):
        run(capsys, *ask, stdin=b"a\nb\n/reset\na\n")
    assert len(set(seeds)) == 6
    seeds.clear()
    run(capsys, *ask, "--seed", 2**32 - 1, stdin=b"a\nb\n/reset\na\n")
    assert seeds == [2**32 - 1, 0, 2**32 - 1]
