"""The other yardstick: transformers' Qwen2 under torch.compile, by the usual means.

Weights, gradients and moments are float32, products bfloat16 by `torch.autocast`; AdamW is PyTorch's fused one.
Attention is `scaled_dot_product_attention`, told that it is causal, so that PyTorch takes its flash kernel. The loss is
made a chunk of tokens at a time and recomputed in the backward pass, for whole float32 logits are 2.5 GB a row, several
times over. `--weights bfloat16` keeps weights, gradients and moments in bfloat16: not the same training, for reference.
`--products fp8` makes the layers' projections torchao's for training in float8, with its default configuration:
float8_e4m3fn forward, float8_e5m2 for gradients, one dynamic scale a tensor. `--remat full` keeps the inputs of layers;
`dots` also keeps the results of matrix products and of attention. `torch_fsdp.py` takes this step on several GPUs.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from experiments.decode.benchmark import say
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError

Step = Callable[[torch.Tensor], dict[str, torch.Tensor]]
# What the backward pass does not compute again with `--remat dots`.
_KEPT = [
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "_grouped_mm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
]


def matmul_rate(device: torch.device) -> float:
    """bfloat16 FLOP/s of an 8192-cubed product of random numbers."""
    x, y = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(x)
    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(16):
            torch.mm(x, y, out=out)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 16 * 2 * 8192**3 / float(np.median(times[1:]))


def measure(
    args: argparse.Namespace, shape: ModelConfig, tokens: np.ndarray
) -> tuple[float, float | None, dict[str, Any]]:
    """Times the training step.

    Args:
      args: of the command line of `benchmark.py`.
      shape: the architecture.
      tokens: int32 [batch, length + 1].

    Returns:
      Seconds of a step; bfloat16 FLOP/s of a large product, or None; further entries of the report.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say_versions(device)
    model, optimizer = make(args, shape, device)
    products = torch.bfloat16 if args.weights == "float32" else None
    return time_steps(args, make_step(Loss(args, model, products), optimizer), tokens, device)


def say_versions(device: torch.device) -> None:
    """A line with the versions and the device."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    say(torch=torch.__version__, transformers=transformers.__version__, device=name, date=time.strftime("%Y-%m-%d"))


def time_steps(
    args: argparse.Namespace, step: Step, tokens: np.ndarray, device: torch.device
) -> tuple[float, float | None, dict[str, Any]]:
    """Takes `args.warmup` steps and times the next `args.steps`, on the same tokens; returns what `measure` does."""
    cuda = device.type == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = True
    ids = torch.as_tensor(tokens, dtype=torch.long, device=device)
    start = time.perf_counter()
    for _ in range(args.warmup):
        step(ids)
    if cuda:
        torch.cuda.synchronize()
    warm = time.perf_counter() - start
    ends: list[Any] = []
    for _ in range(args.steps + 1):
        loss = step(ids)["loss"]
        if cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            ends.append(event)
        else:
            ends.append(time.perf_counter())
    if cuda:
        torch.cuda.synchronize()
        seconds = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(ends)]
    else:
        seconds = np.diff(ends).tolist()
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    # The large product may need its memory.
    del step
    more = {
        "compile": args.compile,
        "weights": args.weights,
        "products": args.products,
        "loss_chunk": args.loss_chunk,
        "peak_gb": peak / 1e9,
        "warmup_s": warm,
        "slowest_ms": max(seconds) * 1e3,
        "loss": float(loss),
    }
    return float(np.median(seconds)), None if args.no_matmul or not cuda else matmul_rate(device), more


def make(args: argparse.Namespace, shape: ModelConfig, device: torch.device) -> tuple[Any, torch.optim.Optimizer]:
    """Model and optimizer, on the device.

    Raises:
      InputError: products of fp8 without torchao.
    """
    model = make_model(args, shape, device)
    return model, make_optimizer(model)


def make_model(args: argparse.Namespace, shape: ModelConfig, device: torch.device) -> Any:
    """transformers' model of a shape, on the device; two processes make the same one."""
    torch.manual_seed(0)
    settings = {**shape.to_hf(), "attn_implementation": "sdpa"}
    if shape.moe is None:
        config, kind = transformers.Qwen2Config(**settings), transformers.Qwen2ForCausalLM
    else:  # Experts by PyTorch's grouped products.
        config = transformers.Qwen2MoeConfig(**settings, experts_implementation="grouped_mm")
        kind = transformers.Qwen2MoeForCausalLM
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, args.weights))
    with device:
        model = kind(config)
    torch.set_default_dtype(before)
    model.config.use_cache = False
    model.train()
    if args.products == "fp8":
        model = _with_float8(model)
    if args.remat == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif args.remat == "dots":
        contexts, layers = functools.partial(create_selective_checkpoint_contexts, _KEPT), model.model.layers
        for i, layer in enumerate(layers):
            layers[i] = checkpoint_wrapper(layer, context_fn=contexts, preserve_rng_state=False)
    return model


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """PyTorch's fused AdamW; norms and biases do not decay."""
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1]
    others = [p for name, p in model.named_parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, fused=True)


def _with_float8(model: Any) -> Any:
    """The model with torchao's projections in its layers; the head and routers stay as they are."""
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError as error:
        raise InputError(
            f"transformers with products of fp8 needs torchao ({error}). Run pip install torchao, or leave --products."
        ) from None

    def in_layer(module: torch.nn.Module, name: str) -> bool:
        return ".layers." in name and name.endswith("_proj")

    return convert_to_float8_training(model, module_filter_fn=in_layer)


class HeadLoss(torch.nn.Module):
    """Sum of the cross-entropy of hidden vectors [N, D] for targets [N]; the logits of a chunk exist at one time."""

    def __init__(self, head: torch.nn.Module, chunk: int, compiled: bool) -> None:
        super().__init__()
        self.head, self.chunk = head, chunk
        self._loss = torch.compile(self._chunk_loss) if compiled else self._chunk_loss

    def _chunk_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.head(hidden).float(), targets, reduction="sum")

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=hidden.device)
        for x, y in zip(hidden.split(self.chunk), targets.split(self.chunk), strict=True):
            total = total + checkpoint(self._loss, x, y, use_reentrant=False)
        return total


class Loss(torch.nn.Module):
    """Mean cross-entropy of ids [batch, length + 1], of which the first of a row is only an input.

    Args:
      args: of the command line.
      model: of `make_model`.
      products: dtype of autocast; None for the dtype of the weights.
    """

    def __init__(self, args: argparse.Namespace, model: Any, products: torch.dtype | None) -> None:
        super().__init__()
        if args.compile == "layers":
            for layer in model.model.layers:
                layer.compile()
        self.decoder = torch.compile(model.model) if args.compile == "model" else model.model
        self.head_loss = HeadLoss(model.lm_head, args.loss_chunk, args.compile != "none")
        self.products = products

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(ids.device.type, self.products, enabled=self.products is not None):
            # Given as it is, without a mask, attention is causal, and nothing looks at the positions for documents.
            causal = {"full_attention": None}
            hidden = self.decoder(input_ids=ids[:, :-1], attention_mask=causal, use_cache=False).last_hidden_state
            loss: torch.Tensor = self.head_loss(hidden.flatten(0, 1), ids[:, 1:].flatten())
            return loss / ids[:, 1:].numel()


def make_step(loss: Loss, optimizer: torch.optim.Optimizer) -> Step:
    """A function of the ids [batch, length + 1] that takes a step; it gives their loss and the gradient's norm."""

    def step(ids: torch.Tensor) -> dict[str, torch.Tensor]:
        value = loss(ids)
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(loss.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": value.detach(), "grad_norm": norm}

    return step
