"""Benchmarks during SFT, DPO and GRPO: the scores are those of the exported model, and nothing else is learned."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import pytest

import convert
from convert.huggingface import export
from qwen_jax.cli.train import _Formats
from qwen_jax.config import load_config
from qwen_jax.errors import InputError
from qwen_jax.inference import ContinuousEngine
from qwen_jax.inference.likelihood import LikelihoodScorer
from qwen_jax.inference.request import Request
from qwen_jax.inference.settings import load_generation_defaults
from qwen_jax.lora import LoRA
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.params import init_params
from qwen_jax.published import published
from qwen_jax.quantization import Quantization, Scheme
from qwen_jax.tokenizer import load_tokenizer, train_bpe
from tests.helpers.runs import assert_same_weights, losses, print_seed
from tests.helpers.small_tasks import WORDS, Choice, Written, measured, write_lines
from train import grpo_command, tune_command
from train.evaluate import registry
from train.evaluate import run as benchmarks
from train.evaluate.encoding import RequestEncoder
from train.evaluate.in_training import OpenedTasks, TaskEvaluation
from train.evaluate.token_model import TokenModel
from train.grpo_run import train_grpo
from train.reward import RewardConfig
from train.tune import tune


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {task.name: task for task in (Choice(), Written())}
    monkeypatch.setattr(registry, "tasks", lambda: found)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat tokenizer, examples of each kind, a reward function, and the tasks' lines."""
    folder, rng = tmp_path_factory.mktemp("files"), print_seed()
    tokenizer = train_bpe([f"{' '.join(WORDS)} system user assistant\n" * 9], 320)
    config = dataclasses.replace(published("tiny"), vocab_size=384, num_layers=1, eos_token_ids=(tokenizer.eos_id,))
    mesh = make_mesh({}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        export(init_params(config, jax.random.key(int(rng.integers(2**31))), mesh), config, folder / "model")
    tokenizer.save(folder / "model")
    write_lines(folder, rng)
    asked = [[{"role": "user", "content": str(rng.choice(WORDS))}] for _ in range(8)]
    good, bad = ([{"role": "assistant", "content": word}] for word in WORDS[:2])
    records = {
        "sft": [{"messages": prompt + good} for prompt in asked],
        "dpo": [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt in asked],
        "grpo": [{"prompt": prompt} for prompt in asked],
    }
    for name, rows in records.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    return folder


REWARD = "def length(completions, **columns):\n    return [float(len(text)) for text in completions]\n"
SMALL = ["step.dtype=float32"]
TUNING = [*SMALL, "stages.0.length=256", "stages.0.batch_size=2", "stages.0.learning_rate=3e-3", "stages.0.epochs=1"]
GRPO = [
    *SMALL, "queries=2", "episodes=3", "sampling.group_size=2", "sampling.max_new_tokens=4", "prompt_length=128",
    "learning_rate=1e-2", "objective.kl_weight=0", "engine.max_seqs=4", "engine.compile_first=false",
]  # fmt: skip


def run_of(files: Path, method: Any, output: Path, **changes: Any) -> tuple[Any, Any]:
    """A configuration of two or three steps on two devices, and the function that runs it."""
    given = {"model": str(files / "model"), "output": str(output), "held_out": [], "lora": False, "config": None}
    if method == "grpo":
        reward = f"{files / 'reward.py'}:length"
        more = {"prompts": [str(files / "grpo.jsonl")], "reward": [reward], "order": None, "set": GRPO}
        config: Any = grpo_command.configuration(argparse.Namespace(**given, **more))
        run: Any = train_grpo
    else:
        more = {"data": [str(files / f"{method}.jsonl")], "set": TUNING}
        config, run = tune_command.configuration(method, argparse.Namespace(**given, **more)), tune
    return dataclasses.replace(config, mesh={"data": 2}, **changes), lambda config: run(config, _Formats())


def written_texts(patch: pytest.MonkeyPatch) -> list[tuple[Request, list[int]]]:
    """A list that gets each text that an engine writes: what was asked, and the ids."""
    texts: list[tuple[Request, list[int]]] = []
    submit = ContinuousEngine.submit

    def recorded(engine: ContinuousEngine, request: Request, **named: Any) -> Any:
        stream = submit(engine, request, **named)
        result = stream.result

        def kept() -> Any:
            found = result()
            texts.append((request, list(found.token_ids)))
            return found

        patch.setattr(stream, "result", kept)
        return stream

    patch.setattr(ContinuousEngine, "submit", recorded)
    return texts


@pytest.mark.draw(2)
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
def test_the_last_scores_of_a_run_are_those_of_its_export(
    method: str, rank: int, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `qwen-jax eval` measures the exported model, or the base with the exported adapter (LoRA).

    Log-probabilities are the same up to float32 rounding. Greedy texts are the same up to the first token that the
    exported model ranks first together with another one, up to this rounding.
    """
    texts = written_texts(monkeypatch)
    tasks = TaskEvaluation(("choice", "written"), every=2, limit=8, data_root=str(files), max_seqs=4)
    config, run = run_of(files, method, tmp_path, tasks=tasks)
    if rank:
        config = dataclasses.replace(config, step=dataclasses.replace(config.step, lora=LoRA(rank)))
    assert not run(config)
    steps = len(losses(tmp_path))
    found = measured(tmp_path)
    assert sorted(found) == sorted({0, *range(2, steps + 1, 2), steps})
    assert found[0]["task/choice/logprob"] != found[steps]["task/choice/logprob"]
    written = list(texts)
    # The exported model.
    mesh = make_mesh({}, jax.devices()[:1])
    folder, adapter = (files / "model", tmp_path / "model") if rank else (tmp_path / "model", None)
    model, params = convert.load(folder, mesh, "float32", Options(stacked=False), adapter=adapter)
    scorer = LikelihoodScorer(model, convert.load(folder, mesh, "float32", adapter=adapter)[1], mesh, dtype="float32")
    tokenizer, ends = load_tokenizer(folder), load_generation_defaults(folder, model).eos_token_ids
    with ContinuousEngine(
        *(model, params, mesh), tokenizer=tokenizer, dtype="float32", max_seqs=4, num_pages=64, eos_token_ids=ends
    ) as engine:
        exported = TokenModel("exported", RequestEncoder(tokenizer, model.context_length), scorer, engine)
        options = benchmarks.RunOptions(files, limit=8)
        summary: dict[str, Any] = benchmarks.run(exported, [Choice(), Written()], tmp_path / "results", options)
        logprob = summary["tasks"]["choice"]["metrics"]["logprob"]["value"]
        assert found[steps]["task/choice/logprob"] == pytest.approx(logprob, rel=1e-5)
        for request, there in texts[-8:]:
            # The last measurement made the last one of these requests; texts of rollouts may come after it.
            here = next(ids for asked, ids in reversed(written) if asked == request)
            same = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), len(here))
            if same < len(here):
                context = [*request.prompt, *here[:same]]
                one, other = scorer.score([(context, [here[same]]), (context, [there[same]])])
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            else:
                assert here == there


def test_what_a_run_learns_does_not_depend_on_tasks(files: Path, tmp_path: Path) -> None:
    """The losses and the weights, of an adapter with dropout: bit for bit."""
    outputs = tmp_path / "plain", tmp_path / "watched"
    for output, tasks in zip(outputs, (None, TaskEvaluation(("choice",), every=3, data_root=str(files))), strict=True):
        config, run = run_of(files, "sft", output, tasks=tasks)
        assert not run(dataclasses.replace(config, step=dataclasses.replace(config.step, lora=LoRA(2, dropout=0.3))))
    assert losses(outputs[0]) == losses(outputs[1])
    assert_same_weights(*outputs, len(losses(outputs[0])))


def test_what_cannot_be_measured_is_an_error_before_training(files: Path, tmp_path: Path) -> None:
    tasks = TaskEvaluation(("choice",), every=2, data_root=str(files))
    config, run = run_of(files, "sft", tmp_path / "run", tasks=tasks)
    with pytest.raises(InputError, match="A reward model has no output head"):
        dataclasses.replace(config, objective=RewardConfig())
    for method in ("dpo", "grpo"):
        config, run = run_of(files, method, tmp_path / "run", tasks=dataclasses.replace(tasks, tasks=("choise",)))
        with pytest.raises(InputError, match=r"no task 'choise'. Similar ones: choice"):
            run(config)
    # Codes of 4 bits have no room for the update of an adapter.
    quantised = dataclasses.replace(load_config(files / "model"), quantization=Quantization(Scheme("int4", 32)))
    opened = OpenedTasks(tasks, load_tokenizer(files / "model"))
    with pytest.raises(InputError, match="cannot be merged into quantised weights"):
        opened.measure_on(quantised, config.step, make_mesh({}, jax.devices()[:1]), print)
    assert not (tmp_path / "run" / "checkpoints").exists()
