"""The experiment of rejection sampling: its control has the same problems, and the whole path runs as a toy."""

import collections
import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest

from experiments.post import synthesis
from experiments.post.results import Results
from tests.helpers.runs import print_seed
from tests.helpers.scripted_model import ScriptedGenerator
from train.synthesize.run import run as run_pipeline

SMALL = dataclasses.replace(
    synthesis.TOY, layers=1, examples=40, start_accuracy=0.0, start_steps=2, read_every=2, readings=4,
    held_out=8, prompts=12, samples=4, sequences=12, max_new_tokens=8, tune_epochs=1.0,
)  # fmt: skip


class Judge:
    """Knows the right answer, and takes some others for right."""

    def __init__(self, *_):
        pass

    def __call__(self, prompts, texts, columns, ended):
        return [text == row["answer"] or len(text) % 3 == 1 for text, row in zip(texts, columns, strict=True)]

    def close(self):
        pass


def rows_of(path):
    """Problems and answers."""
    rows = [json.loads(line)["messages"] for line in path.open()]
    return [(row[-2]["content"], row[-1]["content"]) for row in rows]


def test_the_control_has_the_problems_that_are_solved_and_answers_as_the_model_gives_them(tmp_path):
    rng = print_seed()
    setup = dataclasses.replace(SMALL, prompts=300, samples=8)
    problems = [{"prompt": [{"role": "user", "content": f"problem {i}"}], "answer": str(i)} for i in range(300)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    chances = rng.choice([0.0, 0.2, 0.6, 1.0], 300)

    def answer(request):
        i = int(request.messages[-1]["content"].split()[1])
        draw = np.random.default_rng([request.seed, i]).random(2)
        # Right answers to every second problem differ in their form; wrong ones are many.
        return f"{i}{' ' * int(3 * draw[1] * (i % 2))}" if draw[0] < chances[i] else f"no {draw[1]}"

    class Strict(Judge):
        def __call__(self, prompts, texts, columns, ended):
            return [text.strip() == row["answer"] for text, row in zip(texts, columns, strict=True)]

    made = synthesis.pipeline(setup, "arithmetic", 0, tmp_path / "prompts.jsonl", 1, Strict())
    run_pipeline(made, {"generator": ScriptedGenerator(answer)}, tmp_path / "out")
    filtered, control = (rows_of(tmp_path / "out" / f"{name}.jsonl") for name in ("sft", "unfiltered"))
    counts = collections.Counter(problem for problem, _ in filtered)
    assert counts == collections.Counter(problem for problem, _ in control)
    right = [text.strip() == problem.split()[1] for problem, text in control]
    assert all(text.strip() == problem.split()[1] for problem, text in filtered)
    # Of one answer of each solved problem, as many are right as the model gives there.
    chance_of = {f"problem {i}": chances[i] for i in range(0, 300, 2)}
    for chance in (0.2, 0.6, 1.0):
        mine = [ok for (problem, _), ok in zip(control, right, strict=True) if chance_of.get(problem) == chance]
        solved = chance / (1 - (1 - chance) ** 8)
        assert np.mean(mine) == pytest.approx(solved, abs=4.5 * (solved * (1 - solved) / len(mine)) ** 0.5 + 1e-9)


def test_the_whole_path_runs(tmp_path, monkeypatch):
    """A model that has learned nothing, and a judge that is content with some of what it says."""
    monkeypatch.setattr(synthesis, "Judge", Judge)
    monkeypatch.setattr(synthesis, "fault", lambda answer: "a tag" if "tool_call>" in answer.text else None)
    read, taken = synthesis.read_accuracy, []

    def read_once(*arguments):
        # Each model is read by programs of its own, which take most of the time.
        taken.append(arguments[-1].parent.name)
        return read(*arguments) if len(taken) == 1 else {"sampled": 0.5, "greedy": 0.5}

    tune = synthesis.tune

    def tune_once(config, formats):
        # The two runs differ by their data alone.
        output = pathlib.Path(config.output)
        if output.name != "unfiltered-1":
            return tune(config, formats)
        assert len(rows_of(pathlib.Path(config.data["synthesised"]))) > 0
        shutil.copytree(output.parent / "filtered-1", output)
        return 0

    monkeypatch.setattr(synthesis, "tune", tune_once)
    monkeypatch.setattr(synthesis, "read_accuracy", read_once)
    for _ in range(2):
        # The second time everything is there.
        synthesis.run(SMALL, [0], ["arithmetic"], tmp_path)
        records = Results(tmp_path / "results.jsonl").records
        models = ["start", "filtered-1", "unfiltered-1"]
        assert {record["model"] for record in records} == {f"arithmetic/{name}" for name in models}
        assert len(records) == len({(record["model"], record["metric"]) for record in records})
    assert taken == models
    text = synthesis.table(records)
    assert all(f"| arithmetic | {name} |" in text for name in models)
    data = tmp_path / "0" / "arithmetic" / "synthesis-1"
    assert len(rows_of(data / "sft.jsonl")) == len(rows_of(data / "unfiltered.jsonl")) > 0
