"""`qwen-jax eval rewards`: a whole run on a tiny reward model, and what is found before the weights are loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.cli import main
from qwen_jax.tokenizer import load_tokenizer, train_bpe
from tests.helpers.hf import make_hf_checkpoint
from tests.helpers.reward import make_reward_checkpoint

Capture = pytest.CaptureFixture[str]
PAIRS = [
    {"prompt": "What is in the box?", "chosen": "A cat.", "rejected": "Nothing at all."},
    {"prompt": "And now?", "chosen": "Two cats.", "rejected": "A cat."},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe(["What is in the box? A cat. Nothing at all. system user assistant"] * 9, 400)
    make_reward_checkpoint(folder, "linear", vocab_size=512, eos_token_id=tokenizer.eos_id)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data/preference").mkdir(parents=True)
    lines = "".join(json.dumps(pair) + "\n" for pair in PAIRS)
    (tmp_path / "data/preference/boxes.jsonl").write_text(lines)
    return tmp_path / "data"


def run(capsys: Capture, *argv: Any) -> tuple[int, str, str]:
    status = main(list(map(str, argv)))
    return (status, *capsys.readouterr())


def test_scores_are_those_of_the_score_command(
    capsys: Capture, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The benchmark scores texts as `qwen-jax score` does; a finished run needs no weights."""
    command = ("eval", "rewards", model, "--data-root", data, "--output", tmp_path / "out")
    status, printed, _ = run(capsys, *command, "--json")
    assert status == 0
    summary = json.loads(printed)
    texts = [(pair["prompt"], pair[name]) for pair in PAIRS for name in ("chosen", "rejected")]
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in texts]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    status, scored, _ = run(capsys, "score", model, "--input", tmp_path / "chats.jsonl")
    expected = [json.loads(line)["score"] for line in scored.splitlines()]
    records = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert [score for record in records for score in record["scores"]] == pytest.approx(expected, abs=1e-5)
    right = [first > second for first, second in zip(expected[::2], expected[1::2], strict=True)]
    assert summary["benchmarks"]["preference"]["figures"]["boxes"]["value"] == sum(right) / 2

    def no_weights(*_: Any, **__: Any) -> Any:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("convert.load", no_weights)
    status, printed, err = run(capsys, *command)
    assert status == 0
    assert all(words in printed for words in ("boxes", "table.md"))
    assert "warning: not found: " in err


def test_bad_input_is_found_before_the_weights_are_loaded(
    capsys: Capture, model: Path, data: Path, tmp_path: Path
) -> None:
    make_hf_checkpoint(tmp_path / "language", vocab_size=512)
    train_bpe(["some text"] * 9, 300).save(tmp_path / "language")
    for argv, message in (
        ([model, "--data-root", tmp_path / "nowhere"], "is not a folder"),
        ([model, "--data-root", tmp_path, "--benchmarks", "rmb"], "No data of a reward benchmark"),
        ([tmp_path / "language", "--data-root", data], "no score head"),
        ([model, "--data-root", data, "--bootstrap", "1"], "at least 2"),
    ):
        status, _, err = run(capsys, "eval", "rewards", *argv, "--output", tmp_path / "out")
        assert (status, message in err) == (1, True), err
        assert not (tmp_path / "out").exists()


def test_what_is_asked_for_by_name_and_is_missing_gives_status_1(
    capsys: Capture, model: Path, data: Path, tmp_path: Path
) -> None:
    """What is there has its figures all the same; what is not asked for by name may be missing."""
    command = ("eval", "rewards", model, "--data-root", data)
    for names, status in (((), 0), (("preference",), 0), (("preference", "rmb"), 1)):
        asked = ("--benchmarks", *names) if names else ()
        found, printed, err = run(capsys, *command, *asked, "--output", tmp_path / f"out-{len(names)}", "--json")
        assert found == status
        # What was not asked for by name is a warning, where nothing was asked for.
        assert ("error: not found: " in err, "warning: not found: " in err) == ("rmb" in names, not names)
        assert json.loads(printed)["benchmarks"]["preference"]["items"] == 2


@pytest.mark.parametrize("how", [(), ("--json",)], ids=str)
def test_an_item_longer_than_the_context_gives_status_1(
    capsys: Capture, model: Path, data: Path, tmp_path: Path, how: tuple[str, ...]
) -> None:
    context = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    pair = {"prompt": "Why?", "chosen": "a b " * context, "rejected": "x"}
    with open(data / "preference/boxes.jsonl", "a") as file:
        file.write(json.dumps(pair) + "\n")
    status, _, err = run(capsys, "eval", "rewards", model, "--data-root", data, "--output", tmp_path / "out", *how)
    assert status == 1
    assert "error: 1 items of preference are longer than the model's context" in err


def test_a_model_is_known_by_its_content_and_not_by_its_path(
    capsys: Capture, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("--data-root", data, "--output", tmp_path / "out", "--json")
    assert run(capsys, "eval", "rewards", model, *command)[0] == 0
    before = (tmp_path / "out/results.jsonl").read_bytes()
    shutil.copytree(model, tmp_path / "moved")

    def no_weights(*_: Any, **__: Any) -> Any:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("convert.load", no_weights)
    assert run(capsys, "eval", "rewards", tmp_path / "moved", *command)[0] == 0
    assert (tmp_path / "out/results.jsonl").read_bytes() == before


def test_scores_of_other_weights_are_not_taken(capsys: Capture, model: Path, data: Path, tmp_path: Path) -> None:
    """The folder of a training run has another model tomorrow."""
    changing = tmp_path / "changing"
    shutil.copytree(model, changing)
    command = ("eval", "rewards", changing, "--data-root", data)
    status, _, err = run(capsys, *command, "--output", changing / "out")
    assert (status, "lies in the folder of the model" in err) == (1, True)
    assert run(capsys, *command, "--output", tmp_path / "out")[0] == 0
    make_reward_checkpoint(changing, "linear", vocab_size=512, eos_token_id=load_tokenizer(model).eos_id, seed=7)
    status, _, err = run(capsys, *command, "--output", tmp_path / "out")
    assert (status, "results of other settings: weights" in err) == (1, True), err
