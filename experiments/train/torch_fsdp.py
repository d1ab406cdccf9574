"""The yardstick on several GPUs: the step of `torch_step.py` under PyTorch's FSDP2, a process for each GPU.

Each rank has a part of the rows, and of each float32 weight, gradient and moment. `fully_shard` gathers the weights of
a layer in bfloat16 before its forward and backward pass, frees them after each, and reduce-scatters the gradients in
the dtype of `--reduce`; the next layer's weights arrive while a layer computes. Compilation is layer by layer, as
torchtitan does it, for the hooks of FSDP are not compiled. The head with its loss is gathered once for both passes. If
it is tied to the embedding, both stay gathered.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from experiments.train import torch_step
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError


def measure(
    args: argparse.Namespace, shape: ModelConfig, tokens: np.ndarray, ranks: int
) -> tuple[float, float | None, dict[str, Any]]:
    """Times the training step in processes of its own.

    Args:
      args: of the command line of `benchmark.py`.
      shape: the architecture.
      tokens: int32 [batch, length + 1], of all ranks.
      ranks: how many GPUs, or processes on the CPU.

    Returns:
      Seconds of a step; bfloat16 FLOP/s of a large product on the first GPU, or None; further entries of the report.

    Raises:
      InputError: other products or weights than usual, rows that cannot be divided, or fewer GPUs.
    """
    if args.products != "bfloat16" or args.weights != "float32" or args.compile == "model":
        raise InputError(
            "On a mesh, transformers has products of bfloat16, float32 weights, and --compile layers or none; got "
            f"--products {args.products} --weights {args.weights} --compile {args.compile}."
        )
    if len(tokens) % ranks:
        raise InputError(f"--batch counts the rows of all GPUs: expected a multiple of {ranks}, got {len(tokens)}.")
    if torch.cuda.is_available() and torch.cuda.device_count() < ranks:
        raise InputError(f"Expected {ranks} GPUs for --mesh {args.mesh}, found {torch.cuda.device_count()}.")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_measure_rank, (ranks, folder, args, shape, tokens), ranks)
        seconds, matmul, more = json.loads((Path(folder) / "result.json").read_text())
    return seconds, matmul, {**more, "reduce": args.reduce, "devices": ranks}


def _measure_rank(
    rank: int, ranks: int, folder: str, args: argparse.Namespace, shape: ModelConfig, tokens: np.ndarray
) -> None:
    """A process of `measure`; the first one writes the result."""
    mesh, device = start_rank(rank, ranks, folder)
    if rank == 0:
        torch_step.say_versions(device)
    step = make_step(args, shape, mesh, device, torch.bfloat16)
    result = torch_step.time_steps(args, step, np.split(tokens, ranks)[rank], device)
    if rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def start_rank(rank: int, ranks: int, folder: str) -> tuple[DeviceMesh, torch.device]:
    """Joins the other processes; returns the mesh of all, and the device of this one.

    Args:
      rank: of this process.
      ranks: how many there are.
      folder: an empty one, the same for all.
    """
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{rank}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks
    )
    return init_device_mesh(device.type, (ranks,)), device


def make_step(
    args: argparse.Namespace, shape: ModelConfig, mesh: DeviceMesh, device: torch.device, products: torch.dtype
) -> torch_step.Step:
    """A function of this rank's ids [batch, length + 1] that takes a step.

    Args:
      args: of the command line.
      shape: the architecture.
      mesh: of all ranks.
      device: of this rank.
      products: dtype of gathered weights and of activations.

    Returns:
      A step whose loss and norm of the gradient are those of the rows of all ranks.
    """
    model = torch_step.make_model(args, shape, device)
    loss = torch_step.Loss(args, model, products=None)
    policy = MixedPrecisionPolicy(param_dtype=products, reduce_dtype=getattr(torch, args.reduce))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    if not shape.tie_word_embeddings:
        fully_shard(loss.head_loss, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(loss, mesh=mesh, mp_policy=policy)
    local = torch_step.make_step(loss, torch_step.make_optimizer(loss))

    def step(ids: torch.Tensor) -> dict[str, torch.Tensor]:
        numbers = local(ids)
        dist.all_reduce(numbers["loss"])
        return {"loss": numbers["loss"] / mesh.size(), "grad_norm": numbers["grad_norm"].full_tensor()}

    return step
