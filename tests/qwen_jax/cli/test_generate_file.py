"""`qwen-jax generate --input --output` with a model: the texts of `generate`, and the answers of the server."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.cli import main
from tests.helpers.scripted import make_words


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_words(tmp_path_factory.mktemp("model"))


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_of_requests(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["hello", "hello there, world", "assistant", "user"]
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 6, "model": "any"}
    wrong = {"messages": [{"role": "user", "content": "hello"}], "n": -1}
    url = {"method": "POST", "url": "/v1/chat/completions"}
    records = [{"prompt": prompt} for prompt in prompts]
    records += [{"custom_id": "chat", **url, "body": chat}, {"custom_id": "wrong", **url, "body": wrong}]  # type: ignore[dict-item]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ["--temperature", "0", "--max-new-tokens", "12"]
    command = ["generate", str(model), "--input", str(source), "--output", str(target), "--in-flight", "3", *options]
    assert main(command) == 1
    assert "n" in capsys.readouterr().err
    found = lines(target)
    assert len(found) == 6
    # Plain prompts: what `generate` gives.
    assert main(["generate", str(model), *(x for p in prompts for x in ("--prompt", p)), "--json", *options]) == 0
    want = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert sorted(str(record["text"]) for record in found if "text" in record) == sorted(want)
    # Requests: the server's answers, and its errors.
    answers = {record["custom_id"]: record for record in found if record.get("custom_id")}
    response = answers["chat"]["response"]
    assert isinstance(response, dict)
    assert response["status_code"] == 200
    assert response["body"]["usage"]["completion_tokens"] <= 6
    failed = answers["wrong"]["response"]
    assert isinstance(failed, dict)
    assert failed["status_code"] == 400

    # The same command goes on, wherever it is given; other options have another output.
    assert main([*command, "--mesh", ""]) == 1
    assert "(5 had a result before)" in capsys.readouterr().out
    assert main([*command, "--top-k", "3"]) == 1
    assert "another request, model or options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--input", "x.jsonl"], "both --input and --output"),
        (["--input", "x.jsonl", "--output", "y.jsonl"], "does not exist"),
        (["--input", "x.jsonl", "--output", "y.jsonl", "--prompt", "a"], "--prompt cannot be given"),
        (["--input", "x.jsonl", "--output", "y.jsonl", "--in-flight", "0"], "--in-flight"),
        (["--input", "x.jsonl", "--output", "y.jsonl", "--attention", "pooled"], "dense attention"),
        (["--input", "x.jsonl", "--output", "y.jsonl", "--prefill-chunk", "256"], "Leave out --prefill-chunk"),
    ],
)
def test_wrong_options(model: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str) -> None:
    assert main(["generate", str(model), *options]) == 1
    assert words in capsys.readouterr().err


def test_files_are_looked_at_before_a_model_is_loaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_model(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("qwen_jax.cli.generate.Model", no_model)
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    for source, target, words in (
        ("missing.jsonl", "out.jsonl", "does not exist"),
        ("in.jsonl", "in.jsonl", "both the input and the output"),
        ("in.jsonl", "in.jsonl/out.jsonl", "Cannot make"),
    ):
        files = "--input", str(tmp_path / source), "--output", str(tmp_path / target)
        assert main(["generate", str(model), *files]) == 1
        assert words in capsys.readouterr().err
