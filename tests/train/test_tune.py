"""Tuning runs from the command line to a model that answers: SFT, reward model and DPO, exact resume, and mistakes."""

import argparse
import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from convert.huggingface import export
from convert.quantized.export import export as quantised_export
from convert.quantized.gptq import Gptq
from convert.source import TreeSource
from qwen_jax.cli import main
from qwen_jax.cli.train import _Formats
from qwen_jax.config import load_config
from qwen_jax.errors import InputError
from qwen_jax.files import read_json
from qwen_jax.lora import LoRA
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.params import init_params
from qwen_jax.published import published
from qwen_jax.quantization import Quantization, Scheme
from qwen_jax.tokenizer import load_tokenizer, train_bpe
from tests.helpers.processes import run as run_processes
from tests.helpers.quantized import random_quantized
from tests.helpers.runs import (
    assert_same_weights,
    final_weights,
    launches,
    losses,
    print_seed,
    saved_steps,
    stop_after,
)
from tests.helpers.small_tasks import Written, measured, write_lines
from train import samples, tune, tune_command
from train.evaluate import registry
from train.evaluate.in_training import TaskEvaluation
from train.fields import set_fields
from train.loop import LoopConfig
from train.merging import Merging
from train.observe.metrics import read_log
from train.tune_config import TuneConfig

SMALL = ["step.dtype=float32", "stages.0.length=256", "stages.0.batch_size=4", "stages.0.learning_rate=3e-3"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat tokenizer, and conversations and pairs: some words are good answers, the others bad."""
    folder, rng = tmp_path_factory.mktemp("tune"), print_seed()
    words = ["red", "blue", "green", "grey"]
    tokenizer = train_bpe(["red blue green grey which colour system user assistant\n" * 9], 320)
    config = dataclasses.replace(published("tiny"), vocab_size=384, num_layers=1, eos_token_ids=(tokenizer.eos_id,))
    mesh = make_mesh({}, jax.devices()[:1])
    for name in ("model", "base"):
        with jax.set_mesh(mesh):
            export(init_params(config, jax.random.key(int(rng.integers(2**31))), mesh), config, folder / name)
        tokenizer.save(folder / name)

    def chosen_and_rejected() -> dict[str, Any]:
        right, wrong = words[rng.integers(2)], words[2 + rng.integers(2)]
        said = [{"role": "user", "content": f"which colour {right}"}]
        answers = ([{"role": "assistant", "content": word}] for word in (right, wrong))
        return {"prompt": said, **dict(zip(("chosen", "rejected"), answers, strict=True))}

    for name, count in (("pairs", 48), ("held", 8)):
        records = [chosen_and_rejected() for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        talks = [{"messages": r["prompt"] + r["chosen"]} for r in records]
        (folder / f"{name}-sft.jsonl").write_text("".join(json.dumps(r) + "\n" for r in talks))
    return folder


def arguments(files: Path, method: str, output: Path) -> list[str]:
    end = "-sft.jsonl" if method == "sft" else ".jsonl"
    data = ["--data", str(files / f"pairs{end}"), "--held-out", str(files / f"held{end}")]
    more = ["loop.evaluate_every=4", "stages.0.epochs=3", "samples=2", "sample_tokens=4"]
    return ["--model", str(files / "model"), "--output", str(output), *data, "--set", *SMALL, *more]


def configuration(files: Path, method: Any, output: Path) -> TuneConfig:
    options = arguments(files, method, output)
    paths = {"model": options[1], "output": options[3], "data": [options[5]], "held_out": [options[7]]}
    return tune_command.configuration(method, argparse.Namespace(**paths, config=None, lora=False, set=options[9:]))


@pytest.mark.draw(1)
@pytest.mark.parametrize("method", ["sft", "reward", "dpo"])
def test_the_command_tunes_a_model_and_exports_it(
    method: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert main(["train", method, *arguments(files, method, output)]) == 0
    use = "qwen-jax score" if method == "reward" else "qwen-jax generate --model"
    assert capsys.readouterr().err.count(f"to use with {use}\n") == 2  # The checkpoint and the result.
    records = read_log(output / "metrics.jsonl")
    found = losses(output)
    held_out = [r for r in records if "held_out_loss" in r]
    assert found[-1] < found[0]
    assert held_out[-1]["held_out_loss"] < held_out[0]["held_out_loss"]
    if method == "sft":
        held = [r["held_out_held-sft_token_accuracy"] for r in held_out]
        assert 0 <= held[0] < held[-1] <= 1
        assert held_out[0]["held_out_held-sft_entropy"] > held_out[-1]["held_out_held-sft_entropy"] > 0
        assert all({"token_accuracy", "entropy"} <= r.keys() for r in records if "loss" in r)
    if method == "dpo":
        # At the reference.
        np.testing.assert_allclose([found[0], held_out[0]["held_out_loss"]], np.log(2), rtol=1e-5)
        assert held_out[-1]["held_out_held_rewards/accuracies"] > held_out[0]["held_out_held_rewards/accuracies"] == 0
    if method != "reward":
        # Greedy texts of held-out prompts at every evaluation, which end where the data's answers do.
        samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
        assert [s["step"] for s in samples] == [r["step"] for r in held_out for _ in range(2)]
        assert all(s["prompt"].endswith("<|im_start|>assistant\n") for s in samples)
        assert all(s["answer"].endswith("<|im_end|>") for s in samples)
    config = load_config(output / "model")
    assert config.score == ("linear" if method == "reward" else None)
    if method != "reward":
        tokenizer_ids = read_json(output / "model" / "generation_config.json")["eos_token_id"]
        assert len(tokenizer_ids) == 2
        assert main(["generate", str(output / "model"), "--prompt", "red", "--max-new-tokens", "2"]) == 0
    # Nothing is left to do.
    assert main(["train", method, *arguments(files, method, output)]) == 0


@pytest.mark.draw(1)
@pytest.mark.parametrize("method", ["sft", "reward", "dpo"])
def test_a_stopped_run_resumes_bit_for_bit(
    method: Any, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reward model is an adapter with dropout; the pairs of DPO are a mixture of two data sets."""
    straight, stopped = (configuration(files, method, tmp_path / name) for name in ("straight", "stopped"))
    if method == "reward":
        step = dataclasses.replace(straight.step, lora=LoRA(4, whole=("score",), dropout=0.2, dropout_seed=3))
        straight, stopped = (dataclasses.replace(run, step=step) for run in (straight, stopped))
    if method == "dpo":
        stage = dataclasses.replace(straight.stages[0], mixture={"pairs": 2, "more": "1/2"})
        data = {**straight.data, "more": str(files / "held.jsonl")}
        straight, stopped = (dataclasses.replace(run, data=data, stages=(stage,)) for run in (straight, stopped))
    straight, stopped = (set_fields(run, "optimizer.moments=8bit") for run in (straight, stopped))
    tune.tune(straight, _Formats())
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert tune.tune(stopped, _Formats())
    with pytest.raises(InputError, match="clip_norm, which was 1 and is now 2"):
        tune.tune(set_fields(stopped, "optimizer.clip_norm=2"), _Formats())
    # What may change is told and recorded; what must not, is refused.
    faster = dataclasses.replace(stopped, stages=(dataclasses.replace(stopped.stages[0], rope_theta=1e4),))
    with pytest.raises(InputError, match="had rope_theta"):
        tune.tune(faster, _Formats())
    longer = dataclasses.replace(stopped, examples=dataclasses.replace(stopped.examples, newline=True))
    with pytest.raises(InputError, match="with other data"):
        tune.tune(longer, _Formats())
    assert not tune.tune(dataclasses.replace(stopped, loop=LoopConfig(evaluate_every=5)), _Formats())
    assert launches(tmp_path / "stopped")[-1]["changed"] == {"loop.evaluate_every": [4, 5]}
    last = max(int(p.name) for p in (tmp_path / "straight" / "checkpoints").iterdir() if p.name.isdecimal())
    for run in ("straight", "stopped"):
        assert (tmp_path / run / "checkpoints" / str(last)).is_dir()
    folders = [tmp_path / run / "checkpoints" for run in ("straight", "stopped")]
    assert_same_weights(folders[0].parent, folders[1].parent, last)
    if method == "reward":
        assert read_json(tmp_path / "stopped" / "model" / "adapter_config.json")["lora_dropout"] == 0.2


def test_a_reference_is_computed_again_with_other_products(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers of an earlier launch are read again only if they are of the same products."""

    class EndError(Exception):
        """Nothing is trained."""

    def end(**job: Any) -> None:
        raise EndError

    used = []

    def log_probs(objective: Any, step: Any, mesh: Any, params: Any, packed: Any, console: Any) -> np.ndarray:
        used.append(step.products)
        return np.zeros((len(packed.store), 2), np.float32)

    monkeypatch.setattr(tune, "Job", end)
    monkeypatch.setattr(tune, "reference_log_probs", log_probs)
    config = configuration(files, "dpo", tmp_path / "run")
    for products in ("bfloat16", "bfloat16", "fp8", "fp8", "bfloat16"):
        with pytest.raises(EndError):
            tune.tune(set_fields(config, f"step.products={products}"), _Formats())
    # Of the held-out pairs, and of those that are trained on.
    assert used == ["bfloat16"] * 2 + ["fp8"] * 2


@pytest.mark.parametrize("field", ["reference", "base"])
def test_a_checkpoint_beside_the_model_is_a_language_model_with_its_tokenizer(
    field: str, files: Path, tmp_path: Path
) -> None:
    mesh = make_mesh({}, jax.devices()[:1])
    model = load_config(files / "model")
    scores = dataclasses.replace(model, score="linear")
    with jax.set_mesh(mesh):
        export(init_params(scores, jax.random.key(0), mesh), scores, tmp_path / "scores")
    shutil.copytree(files / "base", tmp_path / "other")
    load_tokenizer(files / "model").save(tmp_path / "scores")
    train_bpe(["zebra quartz jigsaw\n" * 9], 300).save(tmp_path / "other")
    run = configuration(files, "dpo", tmp_path / "run")
    for name, message in (("scores", "is a reward model"), ("other", "has another tokenizer than the model")):
        merging = Merging() if field == "base" else None
        changed = dataclasses.replace(run, **{field: str(tmp_path / name)}, merging=merging)
        with pytest.raises(InputError, match=f"The {field} .*{name} {message}"):
            tune.tune(changed, _Formats())


def test_rows_have_as_many_segments_as_asked(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class EndError(Exception):
        """Nothing is trained."""

    jobs = []

    def end(**job: Any) -> None:
        jobs.append(job)
        raise EndError

    monkeypatch.setattr(tune, "Job", end)
    asked = 2 * int(print_seed().integers(1, 3))
    config = set_fields(configuration(files, "reward", tmp_path / "run"), f"objective.max_segments={asked}")
    with pytest.raises(EndError):
        tune.tune(set_fields(config, "stages.0.length=1024"), _Formats())
    assert jobs[0]["data_record"]["stages"][0]["max_segments"] == asked
    assert jobs[0]["phases"][0].objective.config.max_segments == asked


def test_pairs_that_end_with_padding_are_told(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers would score plain texts at another token than the one that is trained; chats end otherwise."""

    class EndError(Exception):
        """Nothing is trained."""

    def end(**job: Any) -> None:
        raise EndError

    monkeypatch.setattr(tune, "Job", end)
    config = configuration(files, "reward", tmp_path / "run")
    texts = [{"prompt": "which ", "chosen": "red", "rejected": word} for word in ("blue", "grey")]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in texts))
    plain = dataclasses.replace(config, data={"texts": str(tmp_path / "texts.jsonl")})
    for run, told in ((config, False), (plain, True)):
        with pytest.raises(EndError):
            tune.tune(run, _Formats())
        said = capsys.readouterr().err
        assert (f"2 of 2 pairs end with the token that is also padding ({tmp_path}" in said) == told
        assert ("also padding" in said) == told


@pytest.mark.draw(1)
@pytest.mark.parametrize("method", ["sft", "reward", "dpo"])
def test_an_adapter_is_tuned_and_used(
    method: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert main(["train", method, "--lora", *arguments(files, method, output)]) == 0
    found = losses(output)
    assert found[-1] < found[0]
    settings = read_json(output / "model" / "adapter_config.json")
    assert settings["base_model_name_or_path"] == str(files / "model")
    assert settings["modules_to_save"] == (["score"] if method == "reward" else None)
    if method == "dpo":
        # The adapter does nothing at first: the policy is the reference.
        np.testing.assert_allclose(found[0], np.log(2), rtol=1e-5)
    if method == "sft":
        # The last sample is what the exported adapter says of the same prompt.
        last = json.loads((output / "samples.jsonl").read_text().splitlines()[-1])
        command = ["generate", str(files / "model"), "--adapter", str(output / "model"), "--prompt", last["prompt"]]
        capsys.readouterr()
        greedy = ["--dtype", "float32", "--temperature", "0", "--max-new-tokens", "4", "--json"]
        assert main([*command, *greedy]) == 0
        text = json.loads(capsys.readouterr().out)["text"]
        # A model may end at once.
        assert bool(text) == bool(last["text"])
        assert last["text"].startswith(text)
    if method == "reward":
        # Merged into the language model, it is a reward model.
        assert f"{output / 'model'}; to use with qwen-jax convert --merge-adapter" in capsys.readouterr().err
        merged = tmp_path / "merged"
        assert main(["convert", "--merge-adapter", str(output / "model"), str(files / "model"), str(merged)]) == 0
        assert load_config(merged).score == "linear"


@pytest.mark.draw(1)
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_an_adapter_is_tuned_beside_quantised_weights(
    method: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """QLoRA: the base stays as it is, byte for byte; a stopped run resumes; all weights cannot be trained.

    No samples are written, and the run says so.
    """
    info, scheme, quantised = Gptq(codes="int4", group=32), Scheme("int4", 32), tmp_path / "quantised"
    config = dataclasses.replace(load_config(files / "model"), quantization=Quantization(scheme))
    params = random_quantized(config, print_seed())
    quantised_export(TreeSource(params, config), info, quantised, extra_files_from=files / "model")
    before = {file.name: file.read_bytes() for file in quantised.iterdir()}
    straight, stopped = (configuration(files, method, tmp_path / name) for name in ("straight", "stopped"))
    lora = dataclasses.replace(straight.step, lora=LoRA(rank=4))
    with pytest.raises(InputError, match="Train an adapter beside them"):
        tune.tune(dataclasses.replace(straight, model=str(quantised)), _Formats())
    straight, stopped = (dataclasses.replace(c, model=str(quantised), step=lora) for c in (straight, stopped))
    tune.tune(straight, _Formats())
    assert "no samples are written beside quantised weights" in capsys.readouterr().err
    assert not (tmp_path / "straight" / "samples.jsonl").exists()
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert tune.tune(stopped, _Formats())
    assert not tune.tune(stopped, _Formats())
    last = max(int(p.name) for p in (tmp_path / "straight" / "checkpoints").iterdir() if p.name.isdecimal())
    assert_same_weights(tmp_path / "straight", tmp_path / "stopped", last)
    found = losses(tmp_path / "straight")
    assert found[-1] < found[0]
    assert before == {file.name: file.read_bytes() for file in quantised.iterdir()}


def test_merging_nothing_is_the_plain_optimiser(files: Path, tmp_path: Path) -> None:
    """Online merging in a run: with alpha 0 and p 1 the same weights, otherwise others.

    The two programs may sum in another order; the update itself is compared bit for bit in test_merging.
    """
    plain = dataclasses.replace(configuration(files, "dpo", tmp_path / "plain"), held_out={}, export="")
    tune.tune(plain, _Formats())
    for name, merging in (("none", Merging(alpha=0.0, p=1.0)), ("some", Merging(alpha=1e-2, p=0.5))):
        output, base = str(tmp_path / name), str(files / "base")
        changed = dataclasses.replace(plain, output=output, merging=merging, base=base)
        tune.tune(changed, _Formats())
    steps = int(read_log(tmp_path / "plain" / "metrics.jsonl")[-1]["step"])
    plain_weights, none, some = (final_weights(tmp_path / name, steps) for name in ("plain", "none", "some"))
    same = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(same, none, plain_weights)
    with pytest.raises(AssertionError):
        jax.tree.map(same, some, plain_weights)


def test_a_mesh_tunes_as_one_device_does(files: Path, tmp_path: Path) -> None:
    """Losses are the same, and so are the samples of the first evaluation, when no step has changed the weights yet."""
    alone = configuration(files, "dpo", tmp_path / "alone")
    for name, mesh in (("alone", {}), ("mesh", {"fsdp": 2, "context": 2})):
        tune.tune(dataclasses.replace(alone, output=str(tmp_path / name), mesh=mesh, export=""), _Formats())
    np.testing.assert_allclose(losses(tmp_path / "alone"), losses(tmp_path / "mesh"), rtol=1e-4)
    on_one, on_four = (read_log(tmp_path / name / "samples.jsonl") for name in ("alone", "mesh"))
    assert len(on_one) == len(on_four) > alone.samples
    assert on_one[: alone.samples] == on_four[: alone.samples]


def tuned(files: str, output: str) -> list[float]:
    """DPO in one of two processes, in which a task generates texts; the losses."""
    config = configuration(Path(files), "dpo", Path(output))
    tasks = TaskEvaluation(("written",), every=100, limit=5, data_root=files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "tasks", lambda: {"written": Written()})
        assert not tune.tune(dataclasses.replace(config, mesh={"fsdp": 2}, tasks=tasks), _Formats())
    return losses(output)


def test_two_processes_tune_as_one_does(files: Path, tmp_path: Path) -> None:
    """One tokenizes and writes the reference's numbers for both; they write the same samples, and export one model."""
    write_lines(files, print_seed())
    first, second = run_processes(tuned, str(files), str(tmp_path / "two"))
    assert first == second
    np.testing.assert_allclose(first, tuned(str(files), str(tmp_path / "one")), rtol=1e-4)
    # Of the first weights; a text of later ones may differ by a near-tie.
    a, b = (measured(tmp_path / name)[0] for name in ("one", "two"))
    assert a == b
    assert a["task/written/items"] == 5
    one, two = (read_log(tmp_path / name / "samples.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) > 2
    assert one[:2] == two[:2]  # Of the first evaluation, when no step has changed the weights yet.
    assert load_config(tmp_path / "two" / "model") == load_config(tmp_path / "one" / "model")


def without_room_for_samples(files: str, output: str) -> None:
    """SFT in one of two processes, of which the first cannot write its samples after a step."""
    append = samples.append_record

    def full(path: Path, record: dict[str, Any]) -> None:
        if record["step"]:
            raise OSError("the disk is full")
        append(path, record)

    own, message = (InputError, "samples.jsonl failed in process 0") if jax.process_index() else (OSError, "is full")
    config = dataclasses.replace(configuration(Path(files), "sft", Path(output)), mesh={"fsdp": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "append_record", full)
        with pytest.raises(own, match=message):
            tune.tune(config, _Formats())
    # The step is saved, although no checkpoint was due.
    assert saved_steps(output) == [config.loop.evaluate_every]


def test_samples_that_process_0_cannot_write_end_both(files: Path, tmp_path: Path) -> None:
    run_processes(without_room_for_samples, str(files), str(tmp_path / "run"), timeout=300)


def test_mistakes_are_told_before_anything_is_made(files: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    for options, message in (
        (["--model", str(files / "model")], "--data and --output is missing"),
        ([*arguments(files, "sft", output), "stages.0.batch_size=3", "mesh.data=2"], "does not divide"),
        ([*arguments(files, "sft", output), 'stages.0.data=["x"]'], "names 'x'"),
        ([*arguments(files, "sft", output), "mesh.rows=2"], "no axis 'rows'"),
    ):
        with pytest.raises(InputError, match=message):
            tune_command.main("sft", options, _Formats())
    assert not output.exists()
    with pytest.raises(InputError, match="expected one of: messages"):
        tune_command.main("sft", arguments(files, "dpo", output), _Formats())
