"""`qwen-jax eval --tasks`: whole runs on a tiny random model, our tasks beside those of lm-eval."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.cli import main
from qwen_jax.cli.evaluate import InProcess
from qwen_jax.cli.formats import CheckpointFormats
from qwen_jax.cli.model import Model, Running, Sampling
from qwen_jax.tokenizer import train_bpe
from tests.helpers.hf import make_hf_checkpoint
from tests.helpers.runs import print_seed

Capture = pytest.CaptureFixture[str]
QUESTION = "What is {a} plus {b}?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer; its context is 1,024 tokens."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe(["Question: What is 2 plus 2?\nAnswer: The answer is 4. A B C D"] * 9, 400)
    make_hf_checkpoint(folder, vocab_size=416, eos_token_id=tokenizer.eos_id, max_position_embeddings=1024)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MMLU and GSM8K of our own, and a task of lm-eval."""
    root, rng = tmp_path_factory.mktemp("data"), print_seed()
    (root / "mmlu").mkdir()
    (root / "gsm8k").mkdir()
    rows = [f"sums,What is {i} plus 1?,{i},{i + 1},{i + 2},{i + 3},{'ABCD'[int(rng.integers(4))]}" for i in range(12)]
    (root / "mmlu" / "dev.csv").write_text("\n".join(rows[:5]) + "\n")
    (root / "mmlu" / "test.csv").write_text("\n".join(rows[5:]) + "\n")
    sums = [{"question": f"What is {i} plus {i}?", "answer": f"Add.\n#### {2 * i}"} for i in range(6)]
    for name in ("train", "test"):
        (root / "gsm8k" / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in sums))
    (root / "tiny.jsonl").write_text("".join(json.dumps({"q": f"{i} plus 1?", "gold": i % 2}) + "\n" for i in range(5)))
    (root / "tasks").mkdir()
    (root / "tasks" / "tiny_choice.yaml").write_text(
        "task: tiny_choice\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: tiny.jsonl\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: ['A', 'B']\n"
        "doc_to_target: gold\nmetric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return root


def run(capsys: Capture, *argv: Any) -> tuple[int, str, str]:
    status = main(["eval", *map(str, argv)])
    return (status, *capsys.readouterr())


def test_tasks_of_both_kinds_and_again(capsys: Capture, model: Path, data: Path, tmp_path: Path) -> None:
    """The same command again loads no weights, asks nothing, and leaves the same files."""
    out = tmp_path / "out"
    command = ("--model", model, "--tasks", "mmlu", "gsm8k", "tiny_choice", "--data-root", data, "--output", out)
    command = (*command, "--include", data / "tasks", "--limit", 4)
    status, printed, err = run(capsys, *command, "--json")
    assert status == 0, err
    summary = json.loads(printed)
    assert list(summary["tasks"]) == ["mmlu", "gsm8k", "tiny_choice"]
    assert [task["items"] for task in summary["tasks"].values()] == [4, 4, 4]
    assert "warning: mmlu: the first 4 of 7 items alone" in err
    assert "error" not in err
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert {"summary.json", "report.html", "mmlu.jsonl", "gsm8k.jsonl", "tiny_choice.jsonl"} <= set(before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen_jax.cli.model.Model.loaded", no_weights)
        status, printed, err = run(capsys, *command)
    assert status == 0, err
    assert "tiny_choice" in printed
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    # A model is as good as itself.
    status, printed, err = run(capsys, "compare", out, out, "--json")
    assert status == 0, err
    found = json.loads(printed)
    assert found["warnings"] == []
    assert {one["value"] for task in found["tasks"].values() for one in task["metrics"].values()} == {0.0}
    assert run(capsys, "compare", out, out)[0] == 0


def no_weights(*_: Any, **__: Any) -> Any:
    raise AssertionError("the weights were loaded")


def test_bad_input_is_found_before_the_weights_are_loaded(
    capsys: Capture, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_jax.cli.model.Model.loaded", no_weights)
    out = ("--output", tmp_path / "out")
    ours = ("--model", model, "--tasks", "mmlu", "--data-root", data, *out)
    served = ("--base-url", "http://127.0.0.1:1/v1", *ours[2:])
    for argv, words in (
        ((*out, "--tasks", "mmlu"), "either --model DIR or --base-url URL"),
        (("--model", model, *out), "Expected names of tasks"),
        (("--model", model, "--tasks", "mmlu", *out), "--data-root DIR"),
        (("--model", model, "--tasks", "mmlu", "--data-root", tmp_path, *out), "mmlu/dev.csv"),
        (("--model", model, "--tasks", "mmlu", "--data-root", data, "--limit", 0, *out), "--limit must be"),
        (("--model", model, "--tasks", "mmul", "--data-root", data, *out), "mmul"),
        (("compare", tmp_path, tmp_path), "holds no summary.json"),
        (("--model", model, "--tasks", "tiny_choice", "--shots", -1, *out), "--shots must be at least 0, got -1"),
        # Options that nothing would read.
        ((*ours, "--shots", 3), "Leave out --shots: it is for tasks of lm-eval alone"),
        ((*ours, "--chat", "--seed", 2), "Leave out --chat, --seed: it is for"),
        ((*ours, "--served-model", "x"), "Leave out --served-model: without --base-url"),
        ((*ours, "--judge-model", "x"), "Leave out --judge-model: without --judge-url"),
        ((*served, "--adapter", "x", "--mesh", "tensor=2"), "Leave out --mesh, --adapter: with --base-url the server"),
    ):
        status, _, err = run(capsys, *argv)
        assert status == 1, argv
        assert words in err, (argv, err)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").glob("*.html"))


def test_the_list_says_what_data_is_there(capsys: Capture, data: Path) -> None:
    status, printed, _ = run(capsys, "list", "--data-root", data, "--json")
    found = {one["task"]: one for one in map(json.loads, printed.splitlines())}
    assert status == 0
    assert found["mmlu"]["missing"] == []
    assert found["gsm8k"]["shots"] == 4
    assert found["humaneval"]["missing"]
    assert found["humaneval"]["needs"] == ["sandbox"]
    status, printed, _ = run(capsys, "list", "--data-root", data)
    assert status == 0
    # Names of files are whole, however long.
    assert all(name in printed for one in found.values() for name in (one["task"], *one["missing"]))


def test_results_do_not_lie_in_the_folder_of_the_model(capsys: Capture, model: Path, data: Path) -> None:
    """They would change the model's identity, and each run would ask everything again."""
    command = ("--model", model, "--tasks", "mmlu", "--data-root", data)
    status, _, err = run(capsys, *command, "--output", model / "eval")
    assert status != 0
    assert "lies in the folder of the model" in err
    assert not (model / "eval").exists()


def test_the_identity_of_a_model_has_its_file_and_its_adapter(model: Path, tmp_path: Path) -> None:
    """Responses of one are never taken for those of another under the same path, or in another dtype."""
    rng = print_seed()
    file, adapter = tmp_path / "model.gguf", tmp_path / "adapter"
    adapter.mkdir()
    seen = set()
    for _ in range(2):
        file.write_bytes(b"GGUF" + rng.bytes(100))
        (adapter / "adapter_model.safetensors").write_bytes(rng.bytes(100))
        seen.add(CheckpointFormats().fingerprint(str(file)))
        for dtype in ("float32", "bfloat16"):
            running = Running(adapter=str(adapter), dtype=dtype)
            read = InProcess(Model(str(model), Sampling(), running, need_tokenizer=True), 1)
            seen.add(json.dumps(read.identity(), sort_keys=True))
    assert len(seen) == 6
    default = InProcess(Model(str(model), Sampling(), Running(), need_tokenizer=True), 1)
    assert default.identity()["dtype"] == "float32"
