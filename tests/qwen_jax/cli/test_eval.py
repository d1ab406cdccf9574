"""`qwen-jax eval`: whole runs on a tiny random model, and what is found before the weights are loaded."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.cli import main
from qwen_jax.tokenizer import load_tokenizer, train_bpe
from tests.helpers.hf import make_hf_checkpoint
from tests.helpers.scripted_server import Fault, scripted_server
from train.evaluate.text import NOISE

Capture = pytest.CaptureFixture[str]
TEXT = (
    f"{NOISE} There is an important info hidden inside a lot of irrelevant text. The pass key is 1. Remember it.\n"
    "What is the special magic number for it mentioned in the provided text? I will quiz you about the numbers.\n"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer; its context is 1,024 tokens."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe([TEXT] * 9, 500)
    make_hf_checkpoint(folder, vocab_size=512, eos_token_id=tokenizer.eos_id, max_position_embeddings=1024)
    tokenizer.save(folder)
    (folder / "text.txt").write_text(TEXT * 60)
    return folder


@pytest.fixture(scope="module")
def bare(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a tokenizer."""
    folder = tmp_path_factory.mktemp("bare") / "model"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*token*", "vocab*", "merges*", "*.jinja"))
    return folder


def run(capsys: Capture, *argv: Any) -> tuple[int, str, str]:
    status = main(["eval", *map(str, argv)])
    return (status, *capsys.readouterr())


def no_weights(*_: Any, **__: Any) -> Any:
    raise AssertionError("the weights were loaded")


def test_passkey_and_again(capsys: Capture, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    command = ("passkey", model, "--lengths", 300, 400, "--depths", 0, 100, "--samples", 2, "--output", out)
    status, printed, err = run(capsys, *command, "--json")
    assert (status, "error" in err) == (0, False)
    summary = json.loads(printed)
    assert [(c["length"], c["depth"], c["samples"]) for c in summary["cells"]] == [
        (300, 0, 2),
        (300, 100, 2),
        (400, 0, 2),
        (400, 100, 2),
    ]
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [r["prompt_tokens"] for r in records] == [284] * 4 + [384] * 4
    assert (out / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    assert "passkey, 300 tokens: 0.000 over 4 samples" in err
    # The same command reads what is there; a table this time.
    monkeypatch.setattr("convert.load", no_weights)
    status, printed, _ = run(capsys, *command)
    assert status == 0
    assert all(word in printed for word in ("passkey: score", "300", "100%", "heatmap.png", "mean over depths"))
    # The settings have the dtype itself, since its default depends on the machine.
    assert run(capsys, *command, "--dtype", "float32")[0] == 0
    status, _, err = run(capsys, *command, "--seed", 1)
    assert (status, "seed was 0, is 1" in err) == (1, True)


@pytest.mark.draw(1)
@pytest.mark.parametrize("task", ["passkey", "needle", "ruler", "perplexity"])
def test_results_of_other_weights_are_not_taken(
    task: str, capsys: Capture, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model is known by the content of its files: a copy at another path goes on with what is there."""
    shutil.copytree(model, tmp_path / "copy")
    search = ("--depths", 50, "--samples", 1)
    more = {
        "perplexity": ("--text", model / "text.txt", "--windows", 1),
        "ruler": (*search, "--tasks", "niah_single_1"),
    }
    command = ("--lengths", 1000, *more.get(task, search), "--output", tmp_path / "out")
    assert run(capsys, task, model, *command)[0] == 0
    if task != "perplexity":
        # Nothing is left to do.
        with monkeypatch.context() as patch:
            patch.setattr("convert.load", no_weights)
            assert run(capsys, task, tmp_path / "copy", *command)[0] == 0
    make_hf_checkpoint(tmp_path / "copy", vocab_size=512, eos_token_id=0, max_position_embeddings=1024, seed=7)
    status, _, err = run(capsys, task, tmp_path / "copy", *command)
    assert (status, "results of other settings" in err, "weights was" in err) == (1, True, True), err
    # Results are not hashed with the model that they belong to.
    status, _, err = run(capsys, task, model, *command[:-1], model / "out")
    assert (status, "lies in the folder of the model" in err) == (1, True)


def test_needles_in_a_text_with_the_chat_template(capsys: Capture, model: Path, tmp_path: Path) -> None:
    command = ("needle", "--model", model, "--lengths", 700, "--depths", 50, "--samples", 1, "--needles", 3)
    more = ("--asked", 2, "--haystack", model / "text.txt", "--form", "chat", "--output", tmp_path / "out", "--json")
    status, printed, _ = run(capsys, *command, *more)
    assert status == 0
    (record,) = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert len(record["expected"]) == 2
    assert json.loads(printed)["settings"]["needles"] == 3


def test_ruler(capsys: Capture, model: Path, tmp_path: Path) -> None:
    command = ("ruler", model, "--lengths", 1000, "--depths", 10, 90, "--samples", 1)
    status, printed, _ = run(capsys, *command, "--tasks", "niah_single_1", "fwe", "--output", tmp_path / "out")
    assert status == 0
    assert "niah_single_1" in printed
    assert "fwe" in printed
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [(c["task"], c["depth"], c["samples"]) for c in summary["cells"]] == [
        ("niah_single_1", 10, 1),
        ("niah_single_1", 90, 1),
        ("fwe", None, 2),
    ]


def test_ruler_with_text_and_questions(capsys: Capture, model: Path, tmp_path: Path) -> None:
    """Tasks that need a text or questions say so; with these they run."""
    paragraph = {"context": "The box is red.", "qas": [{"question": "What is the box?", "answers": [{"text": "red"}]}]}
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": [paragraph] * 2}]}))
    common = ("ruler", model, "--lengths", 1000, "--depths", 50, "--samples", 1)
    status, _, err = run(capsys, *common, "--tasks", "niah_multivalue", "qa_1")
    assert status == 1
    assert "niah_multivalue (--haystack FILE), qa_1 (--qa FILE in the form of SQuAD)" in err
    files = ("--haystack", model / "text.txt", "--qa", tmp_path / "squad.json", "--output", tmp_path / "out")
    with scripted_server(lambda body: "It is red.") as server:
        tasks = ("--tasks", "niah_multivalue", "qa_1", "--base-url", server.url)
        status, printed, _ = run(capsys, *common, *tasks, *files, "--json")
    assert status == 0
    summary = json.loads(printed)
    assert summary["tasks"] == {"niah_multivalue": 0.0, "qa_1": 1.0}
    assert len(summary["settings"]["questions"]["qa_1"]) == 64
    status, _, err = run(capsys, *common, *files[2:4], *files[2:4])
    assert (status, "the same form" in err) == (1, True)


def test_a_server_answers_prompts_of_token_ids(
    capsys: Capture, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server gets prompts of the exact length; what it refuses is an error and no zero; no weights are loaded."""
    monkeypatch.setattr("convert.load", no_weights)
    tokenizer = load_tokenizer(model)

    def answer(body: dict[str, Any]) -> str | Fault:
        if len(body["prompt"]) + body["max_tokens"] > 450:
            return Fault(status=400)
        assert (body["temperature"], body["max_tokens"]) == (0, 16)
        return re.search(r"The pass key is (\d+)", tokenizer.decode(body["prompt"]))[1]

    with scripted_server(answer) as server:
        command = ("passkey", model, "--base-url", server.url, "--lengths", 300, 500, "--depths", 50, "--samples", 3)
        status, printed, err = run(capsys, *command, "--output", tmp_path / "out", "--json")
        asked = [one.body["prompt"] for one in server.received if one.path == "/v1/completions"]
    assert (status, "3 samples have no score" in err) == (1, True)
    assert sorted(map(len, asked)) == [284] * 3 + [484] * 3
    summary = json.loads(printed)
    assert summary["lengths"]["passkey"] == {"300": 1.0, "500": None}
    assert summary["settings"]["server"]["model"] == "scripted"
    # Options that nothing would read.
    status, _, err = run(capsys, *command, "--dtype", "bfloat16", "--output", tmp_path / "other")
    assert (status, "Leave out --dtype: with --base-url the server has its own" in err) == (1, True)
    status, _, err = run(capsys, "passkey", model, "--served-name", "x", "--output", tmp_path / "other")
    assert (status, "Leave out --served-name: without --base-url" in err) == (1, True)


def test_token_ids_need_no_tokenizer(capsys: Capture, bare: Path, tmp_path: Path) -> None:
    command = ("passkey", bare, "--token-ids", "--first-id", 256, "--lengths", 100, "--depths", 50, "--samples", 3)
    status, printed, _ = run(capsys, *command, "--output", tmp_path / "out", "--json")
    assert status == 0
    records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [len(r["output"].split()) for r in records] == [3, 3, 3]
    assert json.loads(printed)["settings"]["tokenizer"] is None


def test_perplexity(capsys: Capture, model: Path, tmp_path: Path) -> None:
    command = ("perplexity", model, "--text", model / "text.txt", "--lengths", 64, 256, "--windows", 3, "--last", 32)
    status, printed, _ = run(capsys, *command, "--output", tmp_path / "out", "--json")
    assert status == 0
    summary = json.loads(printed)
    assert [(part["length"], part["windows"], part["last"]["tokens"]) for part in summary["lengths"]] == [
        (64, 3, 32),
        (256, 3, 32),
    ]
    assert all(part["loss"] > 0 for part in summary["lengths"])
    assert (tmp_path / "out" / "perplexity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["passkey", "MODEL", "--lengths", "2000"], "exceeds the model's context of 1,024. Give --lengths up to 1,024"),
        (["passkey", "MODEL", "--lengths", "50"], "The task passkey needs at least"),
        (["passkey", "BARE"], "tokenizer"),
        (["passkey", "MODEL", "--haystack", "EMPTY"], "empty"),
        (["passkey", "MODEL", "--haystack", "nowhere.txt"], "does not exist"),
        (["passkey", "MODEL", "--depths", "120"], "percents from 0 to 100"),
        (["passkey", "MODEL", "--samples", "0"], "at least 1"),
        (["passkey", "MODEL", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["passkey"], "Give the model once"),
        (["needle", "MODEL", "--asked", "2"], "1 to 1 keys"),
        (["needle", "BARE", "--token-ids", "--first-id", "500"], "at least 32 ids"),
        (["needle", "BARE", "--token-ids", "--needles", "90", "--lengths", "100"], "do not fit"),
        (["needle", "BARE", "--token-ids", "--haystack", "EMPTY"], "Leave one of them out"),
        (["ruler", "MODEL", "--tasks", "niah_single_1", "--lengths", "150"], "The task niah_single_1 needs at least"),
        (["perplexity", "MODEL"], "--text FILE"),
        (["perplexity", "MODEL", "--text", "EMPTY"], "empty"),
        (["perplexity", "MODEL", "--text", "SHORT", "--bucket", "0"], "must be at least 1"),
        (["perplexity", "MODEL", "--text", "SHORT", "--lengths", "500"], "Give more text"),
        (["perplexity", "MODEL", "--text", "SHORT", "--lengths", "1"], "at least 2"),
        (["perplexity", "MODEL", "--text", "SHORT", "--lengths", "9999"], "exceeds the model's context"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_bad_input_is_found_before_the_weights_are_loaded(
    capsys: Capture,
    model: Path,
    bare: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("convert.load", no_weights)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("A text.\n" * 10)
    names = {"MODEL": model, "BARE": bare, "EMPTY": "empty.txt", "SHORT": "short.txt"}
    status, out, err = run(capsys, *[names.get(word, word) for word in argv])
    assert (status, out) == (1, "")
    assert err.startswith("qwen-jax: error: ")
    assert message in err
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "no folder for results"


def test_an_unknown_task_is_a_wrong_command_line(capsys: Capture, model: Path) -> None:
    with pytest.raises(SystemExit) as error:
        run(capsys, "ruler", model, "--tasks", "niah_single_9")
    assert error.value.code == 2
    assert run(capsys, "unknown")[0] == 2


@pytest.mark.parametrize("task", ["passkey", "needle", "ruler", "perplexity"])
def test_help_teaches(capsys: Capture, task: str) -> None:
    with pytest.raises(SystemExit) as error:
        run(capsys, task, "--help")
    assert error.value.code == 0
    shown = capsys.readouterr().out
    assert "Example: qwen-jax eval" in shown
    assert "--lengths" in shown
