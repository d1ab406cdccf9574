"""Suites name tasks that exist, and say which of them can run."""

from pathlib import Path

import pytest

from qwen_jax.errors import InputError
from train.evaluate import registry
from train.evaluate.suites import SUITES, missing, suite


def test_each_task_of_lm_eval_exists_in_its_files() -> None:
    """Reading its YAML files takes long, so their names are looked for in the text."""
    lm_eval = pytest.importorskip("lm_eval")
    folders = "mmlu mmlu_pro mmlu-redux bbh arc truthfulqa winogrande hellaswag gpqa gsm8k minerva_math belebele xcopa"
    folders += " xwinograd xstorycloze paws-x mgsm kmmlu turkishmmlu okapi benchmarks"
    text = "\n".join(
        path.read_text("utf-8")
        for folder in folders.split()
        for path in (Path(lm_eval.__file__).parent / "tasks" / folder).rglob("*yaml")
    )
    words = {line.partition("#")[0].strip(' -"') for line in text.splitlines()}
    words |= {line.partition(":")[2].strip().strip('"') for line in text.splitlines()}
    named = {entry.task: entry for x in SUITES.values() for entry in x.entries if entry.side == "lm-eval"}
    assert sorted(set(named) - words) == []
    for entry in named.values():
        assert all(path in text for path in entry.data), entry


def test_each_task_of_ours_is_registered_and_has_a_score() -> None:
    """A benchmark that nobody has is an entry that says so."""
    known = registry.tasks()
    ours = [entry.task for one in SUITES.values() for entry in one.entries if entry.side == "ours"]
    assert [name for name in ours if name not in known] == []


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    base = suite("qwen2.5-base")
    entries = {entry.benchmark: entry for entry in base.entries}
    assert len(entries) == len(base.entries)
    shots = {name: entries[name].shots for name in ("MMLU", "BBH", "ARC-C", "TruthfulQA", "HellaSwag", "GSM8K", "MGSM")}
    assert shots == {"MMLU": 5, "BBH": 3, "ARC-C": 25, "TruthfulQA": 0, "HellaSwag": 10, "GSM8K": 4, "MGSM": 8}
    files = {"theorem_qa": ["theorem_qa/test.json"]}
    said = missing(entries["MMLU"], tmp_path, files.get)
    assert said is not None
    assert str(tmp_path / "cais/mmlu") in said
    (tmp_path / "cais" / "mmlu").mkdir(parents=True)
    assert missing(entries["MMLU"], tmp_path, files.get) is None
    assert "--data-root" in (missing(entries["MMLU"], None, files.get) or "")
    assert "theorem_qa/test.json" in (missing(entries["TheoremQA"], tmp_path, files.get) or "")
    assert "not registered" in (missing(entries["HumanEval"], tmp_path, files.get) or "")
    assert "no task" in (missing(entries["ruMMLU"], tmp_path, files.get) or "")
    with pytest.raises(InputError, match=r"qwen2\.5-base or qwen2\.5-instruct"):
        suite("qwen3")
