"""The command line, as a script would use it."""

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from qwen_jax import cli
from qwen_jax.cli import main
from qwen_jax.cli.failures import explain
from qwen_jax.tokenizer import Tokenizer, load_tokenizer, train_bpe
from tests.helpers.hf import make_hf_checkpoint

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer, as one would find it."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe(["hello world, hello there"] * 4, 300)
    make_hf_checkpoint(folder, vocab_size=384, eos_token_id=tokenizer.eos_id, dialect="4", dtype="bfloat16")
    tokenizer.save(folder)
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "max_new_tokens": 5}
    (folder / "generation_config.json").write_text(json.dumps(sampling))
    return folder


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return load_tokenizer(model)


def run(capsys: Capture, *argv: Any) -> tuple[int, str, str]:
    status = main([str(x) for x in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def feed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_info_of_a_name_and_of_a_folder(capsys: Capture, model: Path) -> None:
    status, out, _ = run(capsys, "info", "Qwen/Qwen2.5-7B-Instruct", "--json")
    report = json.loads(out)
    assert status == 0
    assert report["parameters"]["total"] == 7_615_616_512
    assert report["weights_bytes"]["bfloat16"] == 2 * 7_615_616_512
    assert report["kv_bytes_per_token"]["bfloat16"] == 56 * 1024
    assert json.loads(run(capsys, "info", model, "--json")[1])["config"]["vocab_size"] == 384
    assert "7,615,616,512" in run(capsys, "info", "qwen2.5-7b")[1]


def test_convert_and_verify_round_trip(capsys: Capture, model: Path, tmp_path: Path) -> None:
    assert run(capsys, "convert", model, tmp_path / "orbax")[0] == 0
    assert run(capsys, "convert", tmp_path / "orbax", tmp_path / "hf")[0] == 0
    status, out, _ = run(capsys, "verify", model, tmp_path / "hf", "--json")
    assert status == 0
    assert json.loads(out)["max_abs"] == 0
    assert run(capsys, "verify", tmp_path / "orbax", "--against", "transformers")[0] == 0


def test_verify_exit_codes(capsys: Capture, model: Path, tmp_path: Path) -> None:
    tokens = load_tokenizer(model)
    make_hf_checkpoint(tmp_path / "other", vocab_size=384, eos_token_id=tokens.eos_id, dtype="bfloat16", seed=1)
    status, out, _ = run(capsys, "verify", model, tmp_path / "other", "--json")
    assert status == 1
    assert json.loads(out)["passed"] is False
    make_hf_checkpoint(tmp_path / "wide", vocab_size=400)
    status, _, err = run(capsys, "verify", model, tmp_path / "wide")
    assert status == 2
    assert "vocabulary" in err
    assert run(capsys, "verify", model, tmp_path / "missing")[0] == 2
    assert run(capsys, "verify", model)[0] == 2


def generate(capsys: Capture, model: Path, *argv: Any) -> list[dict[str, Any]]:
    status, out, _ = run(capsys, "generate", "--model", model, "--json", *argv)
    assert status == 0
    return [json.loads(line) for line in out.splitlines()]


def test_generate_json(capsys: Capture, model: Path, tokenizer: Tokenizer) -> None:
    (one,) = generate(capsys, model, "--prompt", "hello", "--logprobs", "--seed", 3)
    assert set(one) == {"prompt_token_ids", "token_ids", "text", "finish_reason", "logprobs", "error"}
    assert one["prompt_token_ids"] == tokenizer.encode("hello")
    assert len(one["token_ids"]) == len(one["logprobs"]) == 5, "max_new_tokens of generation_config.json"
    assert one["text"] == tokenizer.decode(one["token_ids"], skip_special_tokens=True)
    assert one["finish_reason"] == "length"
    assert generate(capsys, model, "--prompt", "hello", "--seed", 3)[0]["token_ids"] == one["token_ids"]


def test_generate_takes_prompts_from_everywhere_and_batches_change_nothing(
    capsys: Capture, model: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["hello", "world, hello", "there"]
    (tmp_path / "prompts.txt").write_text("\n".join(texts) + "\n")
    expected = generate(capsys, model, *[x for text in texts for x in ("--prompt", text)])
    assert generate(capsys, model, "--prompt-file", tmp_path / "prompts.txt", "--batch-size", 2) == expected
    feed(monkeypatch, "\n".join(texts).encode())
    assert generate(capsys, model, "--prompt-file", "-") == expected
    ids = [x for text in texts for x in ("--prompt-ids", ",".join(map(str, tokenizer.encode(text))))]
    assert generate(capsys, model, *ids) == expected


def test_generate_streams_the_same_text(capsys: Capture, model: Path) -> None:
    status, out, _ = run(capsys, "generate", "--model", model, "--prompt", "hello", "--seed", 3)
    assert status == 0
    assert out == generate(capsys, model, "--prompt", "hello", "--seed", 3)[0]["text"] + "\n"


def test_generate_on_a_tensor_mesh(capsys: Capture, model: Path) -> None:
    plain = generate(capsys, model, "--prompt", "hello", "--temperature", 0)
    assert generate(capsys, model, "--prompt", "hello", "--temperature", 0, "--mesh", "tensor=2") == plain


def test_tokenize_and_back(capsys: Capture, model: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "hello world\n\nhéllo <|im_end|> 你好\n"
    feed(monkeypatch, text.encode())
    _, out, _ = run(capsys, "tokenize", "--model", model)
    ids = [json.loads(line) for line in out.splitlines()]
    assert ids == [tokenizer.encode(line) for line in text.splitlines()]
    feed(monkeypatch, out.encode())
    assert run(capsys, "tokenize", "--model", model, "--decode")[1] == text


def test_chat_answers_and_forgets_on_reset(capsys: Capture, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feed(monkeypatch, b"hello\n/reset\nhello\nhello\n/exit\nnever\n")
    status, out, _ = run(capsys, "chat", "--model", model, "--temperature", "0", "--max-new-tokens", "6")
    replies = out.split("\n")
    assert status == 0
    assert replies[0] == replies[1]
    assert len([reply for reply in replies if reply]) == 3


def test_chat_reads_utf8_in_any_locale_and_fails_where_a_reply_failed(
    capsys: Capture, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody at a terminal sees the error; a script sees the status. The turns after it are answered."""
    ask = ("chat", "--model", model, "--temperature", "0", "--max-new-tokens", "6")
    feed(monkeypatch, "héllo\n".encode())
    sys.stdin.reconfigure(encoding="ascii")
    expected = run(capsys, *ask)
    assert expected[0] == 0
    feed(monkeypatch, ("x" * 2000 + "\nhéllo\r\n").encode())
    status, out, err = run(capsys, *ask)
    assert (status, out) == (1, expected[1])
    assert "exceed the model's context" in err
    feed(monkeypatch, b"fine\nnot \xff\n")
    status, _, err = run(capsys, *ask)
    assert (status, "line 2 is not UTF-8" in err) == (1, True)


def no_device_memory(*_: Any, **__: Any) -> Any:
    """The runtime's own error."""
    return jax.numpy.zeros(1 << 46, "uint8").block_until_ready()


def no_host_memory(*_: Any, **__: Any) -> Any:
    return np.empty(1 << 50, np.uint8)


@pytest.mark.parametrize(
    ("where", "argv", "stdin"),
    [
        ("qwen_jax.inference.Engine.generate", ["generate", "--model", "MODEL", "--prompt", "a", "--json"], b""),
        ("qwen_jax.inference.Engine.stream", ["chat", "--model", "MODEL"], b"a\n"),
        ("convert.load", ["generate", "--model", "MODEL", "--prompt", "a"], b""),
        ("convert.convert", ["convert", "MODEL", "elsewhere"], b""),
        ("convert.verify.verify", ["verify", "MODEL", "MODEL"], b""),
    ],
)
@pytest.mark.parametrize("failure", [no_device_memory, no_host_memory])
def test_too_little_memory_is_one_message(
    capsys: Capture,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    argv: list[str],
    stdin: bytes,
    failure: Callable[..., Any],
) -> None:
    monkeypatch.setattr(where, failure)
    feed(monkeypatch, stdin)
    status, out, err = run(capsys, *[model if x == "MODEL" else x for x in argv])
    assert status == (2 if argv[0] == "verify" else 1)
    assert out == ""
    assert err.startswith("qwen-jax: error: Out of memory: ")
    assert ("65,536.00 GiB" if failure is no_device_memory else "1.00 PiB") in err, "what was needed"
    assert all(remedy in err for remedy in ("--batch-size", "--dtype", "--mesh")), "what to do"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2147483648 bytes.", "trying to allocate 2.00 GiB"),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 18.45G "
            "of 15.75G hbm. Exceeded hbm capacity by 2.70G.\n\nTotal hbm usage >= 18.97G:",
            "Used 18.45G of 15.75G hbm",
        ),
        (
            "INTERNAL: Error dispatching computation: Out of memory allocating 34369372160 bytes.",
            "allocating 32.01 GiB. What",
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 130M of 128M vmem.", None),
        ("RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 300000, available 232448", None),
        ("INVALID_ARGUMENT: out of memory lane", None),
    ],
)
def test_what_counts_as_too_little_memory(text: str, expected: str | None) -> None:
    """On-chip memory of a kernel is not for the user to mend: that keeps its traceback."""
    problem = explain(jax.errors.JaxRuntimeError(text))
    assert problem is None if expected is None else problem and expected in problem


def test_a_path_that_cannot_be_used_is_no_bug(tmp_path: Path) -> None:
    """What the system says of a path; a missing file is not among it, as a program may have lost one of its own."""
    (file := tmp_path / "file").touch()
    for use, says in (
        (file.mkdir, f"{file}: there is a file or folder of this name. Give another path"),
        ((file / "in").mkdir, "a file stands where a folder is expected"),
        (tmp_path.write_text, "a folder stands where a file is expected"),
        ((tmp_path / ("a" * 300)).touch, "the name is too long"),
    ):
        with pytest.raises(OSError, match="Errno") as raised:
            use(*([""] if use == tmp_path.write_text else []))
        problem = explain(raised.value)
        assert problem is not None
        assert says in problem
    for code, says in ((errno.EROFS, "read-only"), (errno.EACCES, "permission denied")):
        assert says in (explain(OSError(code, "no", "path")) or "")
    assert explain(FileNotFoundError(errno.ENOENT, "no", "path")) is None


def test_a_bug_keeps_its_traceback(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("convert.convert", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["convert", str(model), "elsewhere"])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:surrogateescape", "ascii:backslashreplace"])
def test_output_that_cannot_be_encoded_is_replaced_and_json_is_exact(
    model: Path, tokenizer: Tokenizer, encoding: str
) -> None:
    def output(argv: list[str], stdin: str) -> str:
        command = [sys.executable, "-m", "qwen_jax", *argv, "--model", str(model)]
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run(command, env=environment, input=stdin.encode(), capture_output=True)
        assert done.returncode == 0, done.stderr
        assert b"Traceback" not in done.stderr
        return done.stdout.decode(encoding.split(":")[0])

    text = "hé 你好"
    name, _, errors = encoding.partition(":")
    expected = text.encode(name, errors if errors == "backslashreplace" else "replace").decode(name)
    assert output(["tokenize", "--decode"], json.dumps(tokenizer.encode(text))) == expected + "\n"
    if encoding == "ascii":
        (line,) = output(["generate", "--prompt", text, "--json"], "").splitlines()
        assert json.loads(line)["prompt_token_ids"] == tokenizer.encode(text)
        assert len(output(["generate", "--help"], "")) > 200


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "--model", "MODEL"], "exactly one"),
        (["generate", "--model", "MODEL", "--prompt", "a", "--prompt-ids", "1"], "exactly one"),
        (["generate", "--model", "MODEL", "--prompt", ""], "empty"),
        (["generate", "--model", "MODEL", "--prompt-ids", "1,x"], "token ids such as 1,2,3"),
        (["generate", "--model", "MODEL", "--prompt-ids", "383"], "Prompt 0 has token id 383"),
        (["generate", "--model", "MODEL", "--prompt", "a", "--temperature", "-1"], "temperature must be"),
        (["generate", "--model", "MODEL", "--prompt", "a", "--max-new-tokens", "600"], "context of 512"),
        (["generate", "--model", "MODEL", "--prompt", "a", "--mesh", "tensors=2"], "axes"),
        (["generate", "--model", "MODEL", "--prompt", "a", "--mesh", "tensor=3"], "not divisible"),
        (["generate", "--model", "MODEL", "--prompt", "a", "--mesh", "tensor=64"], "64 devices"),
        (["generate", "--model", "MODEL", "--prompt-file", "nowhere.txt"], "does not exist"),
        (["generate", "--model", "no/such/folder", "--prompt", "a"], "no/such/folder"),
        (["info", "qwen2.5-8b"], "Unknown model"),
        (["convert", "MODEL", "MODEL"], "exists"),
        (["verify", "MODEL", "MODEL", "--against", "transformers"], "one of the two"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_bad_input_is_one_line_on_standard_error(capsys: Capture, model: Path, argv: list[str], message: str) -> None:
    status, out, err = run(capsys, *[str(model) if x == "MODEL" else x for x in argv])
    assert status != 0
    assert out == ""
    assert err.startswith("qwen-jax: error: ")
    assert message in err
    assert "Traceback" not in err


def test_prompt_file_and_standard_input_that_are_not_utf8(
    capsys: Capture, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"fine\nnot \xff\n")
    status, _, err = run(capsys, "generate", "--model", model, "--prompt-file", tmp_path / "prompts.txt")
    assert (status, "line 2 is not UTF-8" in err) == (1, True)
    (tmp_path / "prompts.txt").write_bytes(b"fine\n\nmore\n")
    status, _, err = run(capsys, "generate", "--model", model, "--prompt-file", tmp_path / "prompts.txt")
    assert (status, "line 2 is empty" in err) == (1, True)
    feed(monkeypatch, b"fine\n\xe4\n")
    status, out, err = run(capsys, "tokenize", "--model", model)
    assert (status, "line 2 is not UTF-8" in err, len(out.splitlines())) == (1, True, 1)
    feed(monkeypatch, b"[1,2]\n[1,\n")
    status, _, err = run(capsys, "tokenize", "--model", model, "--decode")
    assert (status, "line 2: expected a JSON array" in err) == (1, True)


def test_verify_that_breaks_in_any_way_could_not_compare(
    capsys: Capture, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 1 would tell a script that the weights differ."""

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("a broken disk")

    monkeypatch.setattr("convert.verify.verify", broken)
    status, out, err = run(capsys, "verify", model, model, "--json")
    assert (status, json.loads(out)) == (2, {"passed": None, "error": "a broken disk"})
    assert "a broken disk" in err


def test_reader_that_leaves_is_no_traceback() -> None:
    command = Path(sys.executable).parent / "qwen-jax"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        ["bash", "-c", f"{command} info qwen2.5-7b | true"], env=environment, capture_output=True, text=True
    )
    assert done.stderr == ""


@pytest.mark.parametrize(
    "command", ["", "info", "convert", "verify", "generate", "chat", "tokenize", "quickstart", "train pretrain"]
)
def test_help_explains(capsys: Capture, command: str) -> None:
    try:
        status = main([*command.split(), "--help"])
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    assert status == 0
    assert len(capsys.readouterr().out) > 200


def test_a_command_may_have_two_words(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli._COMMANDS, "model info", cli._COMMANDS["info"])
    assert run(capsys, "model", "info", "qwen2.5-7b") == run(capsys, "info", "qwen2.5-7b")
    assert "model info  " in run(capsys, "--help")[1]
    assert run(capsys, "model", "frobnicate")[0] == 2


def test_help_of_a_group_shows_its_commands_alone(capsys: Capture) -> None:
    for group in {name.split()[0] for name in cli._COMMANDS if " " in name and name.split()[0] not in cli._COMMANDS}:
        status, out, _ = run(capsys, group, "--help")
        shown = {line[2:].split("  ")[0] for line in out.splitlines() if line.startswith("  ")}
        assert (status, shown) == (0, {name for name in cli._COMMANDS if name.startswith(f"{group} ")})
        assert run(capsys, group)[:2] == (2, out)
    assert run(capsys, "modell", "--help")[0] == 2


@pytest.mark.parametrize(
    "command",
    [
        *("scaling fit --runs F", "upcycle A B", "data review F", "data mixture regress"),
        *("eval --model A --output B", "eval needle A", "eval ruler A", "eval rewards A", "eval system-prompts A"),
    ],
)
def test_a_seed_is_at_least_0(capsys: Capture, command: str) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--seed", "-1"])
    assert end.value.code == 2
    assert "Error parsing --seed" in capsys.readouterr().err


def test_unknown_command_and_option_exit_with_2(capsys: Capture) -> None:
    assert run(capsys, "frobnicate")[0] == 2
    with pytest.raises(SystemExit) as exit_:
        main(["info", "qwen2.5-7b", "--frobnicate"])
    assert exit_.value.code == 2
    assert capsys.readouterr().out == ""


def test_installed_command_ignores_the_users_own_modules(model: Path, tmp_path: Path) -> None:
    """Not even with the working directory on the path; and without a terminal no escape codes are written."""
    for name in ("train", "convert"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    command = Path(sys.executable).parent / "qwen-jax"
    for argv in ([str(command)], [sys.executable, "-m", "qwen_jax"]):
        done = subprocess.run(
            [*argv, "convert", str(model), f"out-{len(argv)}"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout + done.stderr
    helped = subprocess.run([str(command), "generate", "--help"], capture_output=True, text=True, check=True)
    assert "\x1b" not in helped.stdout


@pytest.mark.parametrize("soon", [0.05, 1e-6])
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_during_a_garbage_collection_ends_the_command(name: str, status: int, soon: float) -> None:
    """Python ignores exceptions in a callback of the collector, as JAX has one; the command ends nevertheless.

    Also where the machine is so slow, or the clock so fast, that it rings while the first exception is looked at.
    """
    code = f"""
import gc, os, signal, sys, time
from qwen_jax import cli

# Ignored where the tests run in the background of a shell.
signal.signal(signal.SIGINT, signal.default_int_handler)

def callback(phase, information):
    gc.callbacks.remove(callback)
    os.kill(os.getpid(), signal.{name})
    time.sleep(0)

def command(name, argv):
    gc.callbacks.append(callback)
    gc.collect()
    time.sleep(20)
    return 0

cli._run, cli._SOON = command, {soon}
sys.exit(cli.main(["info"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, "")
