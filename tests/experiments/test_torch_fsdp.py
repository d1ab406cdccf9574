"""PyTorch's FSDP2 takes the step of one process, and the benchmark runs it in processes of its own."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import distributed

from experiments.train import benchmark, torch_fsdp, torch_step
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.published import published
from tests.helpers.hf import randomise

RANKS, ROWS, LENGTH, STEPS = 2, 4, 33, 4
# Tied and untied: FSDP gathers the head in different ways. What is recomputed must not matter.
CASES = [("tiny", "none"), ("tiny-untied", "dots"), ("tiny", "full"), ("tiny-untied", "none")]


def _case(index: int, seed: int) -> tuple[ModelConfig, list[str], torch.Tensor]:
    """Architecture, options and the tokens of all steps, of a case; the same in all processes."""
    (model, remat), rng = CASES[index], np.random.default_rng([seed, index])
    shape = dataclasses.replace(published(model), vocab_size=int(rng.integers(100, 200)), rope_theta=1e4)
    options = f"transformers --model {model} --remat {remat} --compile none --reduce float32 --loss-chunk 20".split()
    return shape, options, torch.as_tensor(rng.integers(0, shape.vocab_size, (STEPS, ROWS, LENGTH)))


def _numbers(step: torch_step.Step, batches: torch.Tensor) -> list[list[float]]:
    """Loss and norm of the gradient of each step."""
    return [[float(number) for number in step(ids).values()] for ids in batches]


def _with_other_weights_and_updates(patch: pytest.MonkeyPatch, seed: int) -> None:
    """Weights far from the beginning, and updates that the later steps can show.

    Adam divides by a gradient's size: with the usual eps, a gradient of nothing but rounding errors moves its weight as
    far as any other, and float32 trajectories part.
    """
    make_model, make_optimizer = torch_step.make_model, torch_step.make_optimizer

    def model(*args):
        made = make_model(*args)
        randomise(made, seed)
        return made

    def optimizer(loss):
        made = make_optimizer(loss)
        for group in made.param_groups:
            group.update(lr=3e-3, eps=1e-4)
        return made

    patch.setattr(torch_step, "make_model", model)
    patch.setattr(torch_step, "make_optimizer", optimizer)


def _rank(rank: int, folder: str, seed: int) -> None:
    """One of the processes: the steps of all cases in float32; the first one leaves their numbers."""
    torch.set_num_threads(1)
    mesh, device = torch_fsdp.start_rank(rank, RANKS, folder)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        _with_other_weights_and_updates(patch, seed)
        for index in range(len(CASES)):
            shape, options, batches = _case(index, seed)
            step = torch_fsdp.make_step(benchmark.parse(options), shape, mesh, device, torch.float32)
            found.append(_numbers(step, batches.split(ROWS // RANKS, dim=1)[rank]))
    if rank == 0:
        with open(f"{folder}/numbers.json", "w") as file:
            json.dump(found, file)
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_take_the_step_of_one_process(tmp_path, monkeypatch):
    """Loss and norm of the gradient over all rows, four steps long: the later ones hold only if the updates agree too.

    The processes sum in another order: some roundings of float32 (6e-8) apart, which the steps amplify.
    """
    seed = int(np.random.default_rng().integers(2**31))
    torch.multiprocessing.spawn(_rank, (str(tmp_path), seed), RANKS)
    found = json.loads((tmp_path / "numbers.json").read_text())
    _with_other_weights_and_updates(monkeypatch, seed)
    for index, numbers in enumerate(found):
        shape, options, batches = _case(index, seed)
        args = benchmark.parse(options)
        model, optimizer = torch_step.make(args, shape, torch.device("cpu"))
        expected = _numbers(torch_step.make_step(torch_step.Loss(args, model, None), optimizer), batches)
        np.testing.assert_allclose(numbers, expected, rtol=1e-5, err_msg=f"{CASES[index]}, seed {seed}")
        assert expected[0][0] - expected[-1][0] != 0


@pytest.mark.slow
def test_a_mesh_of_transformers_is_measured_for_each_gpu(capfd):
    small = "--model tiny --layers 1 --batch 4 --length 32 --loss-chunk 64 --steps 2 --warmup 1 --no-matmul"
    benchmark.run_transformers(benchmark.parse(f"transformers {small} --compile none --mesh fsdp=2".split()))
    first, line = map(json.loads, capfd.readouterr().out.splitlines())
    assert first["torch"] == torch.__version__, "said by one rank alone"
    assert (line["what"], line["devices"], line["mesh"]) == ("transformers, fsdp=2", 2, "fsdp=2")
    np.testing.assert_allclose(line["tokens_per_s_device"], line["tokens_per_s"] / 2, rtol=2e-3)
    np.testing.assert_allclose(line["tokens_per_s"], 4 * 32 / line["step_ms"] * 1e3, rtol=2e-3)
    assert 6.0 < line["loss"] < 6.5, "that of 512 equally likely tokens is 6.24"


def test_what_a_mesh_of_transformers_does_not_take():
    for options, message in {
        "--mesh tensor=2": "no other axis than fsdp",
        "--mesh fsdp=2 --batch 3": "expected a multiple of 2, got 3",
        "--mesh fsdp=2 --batch 4 --compile model": "--compile layers or none",
        "--mesh fsdp=2 --batch 4 --products fp8": "products of bfloat16",
        "--mesh fsdp=2 --batch 4 --weights bfloat16": "float32 weights",
    }.items():
        with pytest.raises(InputError, match=message):
            benchmark.run_transformers(benchmark.parse(f"transformers --model tiny --length 8 {options}".split()))
