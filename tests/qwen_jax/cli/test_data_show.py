"""`qwen-jax data show`: what it prints is what is trained."""

import html
import json
import re
from pathlib import Path

import pytest

from qwen_jax.cli import main
from tests.helpers.conversations import chat_tokenizer

MESSAGES = [
    {"role": "user", "content": "<b>Hi</b> <|im_end|> [red]x[/red]"},
    {"role": "assistant", "content": "Yes & no."},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    chat_tokenizer().save(folder)
    return folder


def lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_text_in_colour(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    """The printed text is the rendered one, and green is what is trained."""
    path = lines(tmp_path / "a.jsonl", {"messages": MESSAGES}, {"messages": MESSAGES})
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["data", "show", str(path), "--model", str(model), "--limit", "1"]) == 0
    out = capsys.readouterr().out
    green = re.findall(r"\x1b\[[\d;]*\b32m(.*?)\x1b\[0m", out, flags=re.DOTALL)
    assert "".join(green) == "Yes & no.<|im_end|>"
    plain = re.sub(r"\x1b\[[\d;]*m", "", out)
    assert (
        "<|im_start|>user\n<b>Hi</b> <|im_end|> [red]x[/red]<|im_end|>\n<|im_start|>assistant\nYes & no.<|im_end|>"
        in plain
    )
    assert re.search(rf"{re.escape(str(path))}, line 1: \d+ tokens, \d+ trained", plain)
    assert "line 2" not in plain


def test_json_and_html(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    """A pair, as an object and as a page, with the same trained text in both; typed control tokens are told apart."""
    other = MESSAGES[1] | {"content": "?"}
    record = {"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": [other], "margin": 2}
    path = lines(tmp_path / "a.jsonl", record)
    command = ["data", "show", str(path), "--tokenizer", str(model), "--newline"]
    assert main([*command, "--json"]) == 0
    (shown,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (shown["kind"], shown["margin"], shown["where"]) == ("pairs", 2.0, f"{path}, line 1")
    trained = ["".join(run["text"] for run in answer["runs"] if run["trained"]) for answer in shown["answers"]]
    assert trained == ["Yes & no.<|im_end|>\n", "?<|im_end|>\n"]
    control = [run["text"] for run in shown["answers"][1]["runs"] if run["control"]]
    assert "".join(control) == "<|im_start|><|im_end|>" * 3
    page = tmp_path / "page.html"
    assert main([*command, "--html", str(page)]) == 0
    marked = re.findall(r"<mark>(.*?)</mark>", page.read_text(), flags=re.DOTALL)
    assert [html.unescape(re.sub("</?b>", "", text)) for text in marked] == [
        run["text"] for answer in shown["answers"] for run in answer["runs"] if run["trained"]
    ]


def test_bad_input(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"messages": MESSAGES[:1]})
    good = lines(tmp_path / "good.jsonl", {"messages": MESSAGES})
    for arguments, message in (
        ([str(path), "--model", str(model)], "a.jsonl, line 1: expected an assistant's turn"),
        ([str(path)], "Give the model once"),
        (["--model", str(model)], "No examples"),
        ([str(path), "--model", str(model), "--limit", "0"], "limit must be at least 1"),
        ([str(good), "--model", str(model), "--html", "/nowhere/x"], "Cannot write"),
    ):
        assert main(["data", "show", *arguments]) == 1
        assert message in capsys.readouterr().err
