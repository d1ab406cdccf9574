"""Fine-tuning beside a plain PyTorch loop around transformers, of unpacked examples: 20 steps, the same losses."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from convert import load_params
from qwen_jax.config import load_config
from qwen_jax.parallel.sharding import make_mesh
from tests.helpers.hf import make_hf_checkpoint
from tests.helpers.pairs import TokenPair, pack_pairs, random_pairs
from train.data.batch import place
from train.dpo import Dpo, DpoConfig, make_reference_pass
from train.objective import Objective
from train.optimizer import AdamW, OptimizerConfig, Schedule, make_schedule
from train.pretrain import NextToken, PretrainConfig
from train.state import fresh_state
from train.step import StepConfig, make_train_step

STEPS, LENGTH, BETA = 20, 64, 0.3
OPTIMIZER = OptimizerConfig(Schedule(STEPS, 2e-3, warmup_steps=3), AdamW(eps=1e-6))
STEP = StepConfig("float32", "none")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of PyTorch cost more than they save at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """A tiny model with a head of its own, and its folder."""
    return make_hf_checkpoint(tmp_path, tie=False, hidden_size=32, intermediate_size=48), tmp_path


@pytest.fixture
def batches() -> list[list[TokenPair]]:
    """Four pairs each, which the steps take in turn."""
    seed = int(np.random.SeedSequence().entropy) % 2**32  # type: ignore[arg-type]
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    return [random_pairs(rng, 4, 160) for _ in range(3)]


def rows(pairs: list[TokenPair]) -> Any:
    """Two rows, one of three pairs with padding before them."""
    return pack_pairs([pairs[:1], pairs[1:]], 3 * LENGTH, "left")


def log_prob(model: Any, prompt: np.ndarray, answer: np.ndarray) -> Any:
    """Of an answer, summed over its tokens."""
    ids = torch.as_tensor(np.concatenate([prompt, answer]))[None].long()
    every = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
    return every[torch.arange(len(every)), ids[0, 1:]][len(prompt) - 1 :].sum()


def torch_losses(model: Any, loss_of: Callable[[int], Any]) -> list[float]:
    """A plain loop: AdamW with decay of matrices only, clipping, and our learning rates."""
    adamw, rate = OPTIMIZER.adamw, make_schedule(OPTIMIZER)
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        (others if name.endswith(("bias", "norm.weight")) else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": adamw.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(adamw.beta1, adamw.beta2), eps=adamw.eps)
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = float(rate(step))
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), adamw.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


def our_losses(objective: Objective[Any, Any, Any], folder: Path, data: list[Any]) -> list[float]:
    """The losses of our training steps, from the weights in a folder."""
    mesh, losses = make_mesh({}), []
    with jax.set_mesh(mesh):
        state = fresh_state(OPTIMIZER, load_params(folder, objective.model, mesh), mesh)
        # Compiling takes most of the time; LLVM's optimisations do not matter here.
        lowered = make_train_step(objective, OPTIMIZER, STEP, mesh).lower(state, place(data[0], mesh))  # type: ignore[attr-defined]
        step = lowered.compile({"xla_backend_optimization_level": "0"})
        for i in range(STEPS):
            state, metrics = step(state, place(data[i % len(data)], mesh))
            losses.append(float(metrics["loss"]))
    return losses


def test_fine_tuning_on_answers(model: Any, batches: list[list[TokenPair]]) -> None:
    hf, folder = model
    examples = [[(p.prompt, answer) for p in pairs for answer in (p.chosen, p.rejected)] for pairs in batches]

    def loss_of(step: int) -> Any:
        some = examples[step % len(examples)]
        return -sum(log_prob(hf, *example) for example in some) / sum(len(answer) for _, answer in some)

    objective = NextToken(load_config(folder), PretrainConfig(loss_chunk=16, compact_loss=True))
    got = our_losses(objective, folder, [rows(pairs).batch for pairs in batches])
    want = torch_losses(hf, loss_of)
    assert want[-1] < want[0] - 0.5
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_dpo(model: Any, batches: list[list[TokenPair]]) -> None:
    """The reference is the initial model, in both loops by its own pass."""
    hf, folder = model
    with torch.no_grad():
        references = [[[log_prob(hf, p.prompt, x) for x in p[1:3]] for p in pairs] for pairs in batches]

    def loss_of(step: int) -> Any:
        pairs, reference = batches[step % len(batches)], references[step % len(batches)]
        losses = []
        for pair, (of_chosen, of_rejected) in zip(pairs, reference, strict=True):
            chosen = log_prob(hf, pair.prompt, pair.chosen) - of_chosen
            rejected = log_prob(hf, pair.prompt, pair.rejected) - of_rejected
            losses.append(-torch.nn.functional.logsigmoid(BETA * (chosen - rejected)))
        return sum(losses) / len(losses)

    objective, mesh = Dpo(load_config(folder), DpoConfig(BETA, max_segments=6, loss_chunk=16)), make_mesh({})
    with jax.set_mesh(mesh):
        params = load_params(folder, objective.model, mesh)
        reference_pass = make_reference_pass(objective, STEP, mesh)
        data = [jax.device_get(reference_pass(params, place(rows(pairs), mesh))) for pairs in batches]
    got = our_losses(objective, folder, data)
    want = torch_losses(hf, loss_of)
    assert want[-1] < want[0] - 0.3
    np.testing.assert_allclose(got, want, atol=1e-4)
