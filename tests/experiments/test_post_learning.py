"""The whole path of the post-training experiment at toy size: every run, readings, resume, table."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments.post import learning as experiment
from qwen_jax.errors import InputError
from tests.helpers.runs import print_seed

SMALL = dataclasses.replace(
    experiment.TOY, layers=1, copies=200, pretrain_steps=4, pretrain_batch=4, short=8, examples=8, pairs=8, samples=4
)


@pytest.fixture
def quick_compilation():
    """Programs run once here: compiling them takes most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_the_whole_path(tmp_path, monkeypatch):
    folder, texts = tmp_path / "run", tmp_path / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i}.txt").write_text(f"Document {i} says that {i} is a number. " * 20)
    monkeypatch.setattr(experiment, "_MAX_NEW_TOKENS", 8)
    experiment.run(SMALL, [0], ["released"], folder, [str(texts)])
    lines = (folder / "results.jsonl").read_bytes()
    records = [json.loads(line) for line in lines.splitlines()]
    found = {(r["model"], r["metric"]): r["value"] for r in records}
    assert len(found) == len(records)
    assert {model for model, _ in found} == {"pretrained", "sft", "dpo-released", "reward"}
    for kind in experiment.KINDS:
        assert ("dpo-released", f"pairs/{kind}/rewards/accuracies") in found
        # The scorer reads what training and its evaluation read.
        scored, evaluated = found["reward", f"ranking/{kind}/difference"], found["reward", f"pairs/{kind}/margin"]
        np.testing.assert_allclose(scored, evaluated, rtol=1e-3, atol=1e-4)
        assert found["reward", f"ranking/{kind}"] == found["reward", f"pairs/{kind}/accuracy"]

    # Nothing is done again, and a damaged line costs only its reading.
    for name in ("pretrain", "tune"):
        monkeypatch.setattr(experiment, name, None)
    experiment.run(SMALL, [0], ["released"], folder, [str(texts)])
    assert (folder / "results.jsonl").read_bytes() == lines
    (folder / "results.jsonl").write_bytes(b"".join(lines.splitlines(keepends=True)[:-2]))
    experiment.run(SMALL, [0], ["released"], folder, [str(texts)])
    assert len((folder / "results.jsonl").read_bytes().splitlines()) == len(records)
    with pytest.raises(InputError, match="other settings"):
        experiment.run(dataclasses.replace(SMALL, pairs=9), [0], ["released"], folder, [str(texts)])


def test_tests_are_held_out_and_answers_right(tmp_path):
    seed = int(print_seed().integers(2**31))
    setup = dataclasses.replace(SMALL, short=50, examples=400, pairs=400, samples=50)
    experiment.write_examples(setup, seed, tmp_path)
    items = experiment.held_out_items(setup, seed)
    tests = {item.prompt for found in items.values() for item in found}
    assert len(tests) == 50 * (len(experiment.TASKS) + 1)

    def read(name):
        return [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]

    for name in ("short", "tasks"):
        assert not tests & {record["messages"][1]["content"] for record in read(name)}
    for kind in experiment.KINDS:
        training, held_out = ({r["prompt"][1]["content"] for r in read(f)} for f in (kind, f"{kind}-held-out"))
        assert not held_out & training
        assert not tests & (held_out | training)
        assert all(record["chosen"] != record["rejected"] for record in read(kind))
    for item in items["add"]:
        a, _, b = item.prompt.removeprefix("What is ").removesuffix("?").split()
        assert int(a) + int(b) == int(item.answer)


def test_the_table_has_means_and_deviations():
    records = [{"seed": s, "model": "sft", "metric": "accuracy/mean", "value": v} for s, v in enumerate((0.5, 0.7))]
    assert "| sft | 0.600 ± 0.141 |" in experiment.table(records)
