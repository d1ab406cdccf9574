"""The other yardstick: transformers' Qwen2 under torch.compile, by the usual means.

Weights, gradients and moments are float32, products bfloat16 by `torch.autocast`; AdamW is PyTorch's fused one.
Attention is `scaled_dot_product_attention`, told that it is causal, so that PyTorch takes its flash kernel. The loss is
made a chunk of tokens at a time and recomputed in the backward pass, for whole float32 logits are 2.5 GB a row, several
times over. `--weights bfloat16` keeps weights, gradients and moments in bfloat16: not the same training, for reference.
`--products fp8` makes the layers' projections torchao's for training in float8, with its default configuration:
float8_e4m3fn forward, float8_e5m2 for gradients, one dynamic scale a tensor.
"""

import argparse
import contextlib
import itertools
import time
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.checkpoint import checkpoint

from experiments.decode.benchmark import say
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError


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
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name() if cuda else "cpu"
    say(torch=torch.__version__, transformers=transformers.__version__, device=name, date=time.strftime("%Y-%m-%d"))
    torch.backends.cuda.matmul.allow_tf32 = True
    model, optimizer = make(args, shape, device)
    step = make_step(args, model, optimizer)
    ids = torch.as_tensor(tokens, dtype=torch.long, device=device)
    start = time.perf_counter()
    for _ in range(args.warmup):
        loss = step(ids)
    if cuda:
        torch.cuda.synchronize()
    warm = time.perf_counter() - start
    ends: list[Any] = []
    for _ in range(args.steps + 1):
        loss = step(ids)
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
    del model, optimizer, step
    return float(np.median(seconds)), None if args.no_matmul or not cuda else matmul_rate(device), more


def make(args: argparse.Namespace, shape: ModelConfig, device: torch.device) -> tuple[Any, torch.optim.Optimizer]:
    """Model and optimizer, on the device.

    Raises:
      InputError: products of fp8 without torchao.
    """
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
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1]
    others = [p for name, p in model.named_parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, fused=True)
    return model, optimizer


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


def make_step(args: argparse.Namespace, model: Any, optimizer: torch.optim.Optimizer) -> Any:
    """A function of the ids [batch, length + 1] that takes a step and gives the loss, a tensor."""
    decoder, head = model.model, model.lm_head
    if args.compile == "model":
        decoder = torch.compile(decoder)
    elif args.compile == "layers":
        for layer in decoder.layers:
            layer.compile()

    def chunk_loss(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")

    if args.compile != "none":
        chunk_loss = torch.compile(chunk_loss)

    def autocast() -> Any:
        if args.weights == "bfloat16":
            return contextlib.nullcontext()
        return torch.autocast(next(model.parameters()).device.type, torch.bfloat16)

    def step(ids: torch.Tensor) -> torch.Tensor:
        with autocast():
            # Given as it is, without a mask, attention is causal, and nothing looks at the positions for documents.
            causal = {"full_attention": None}
            hidden = decoder(input_ids=ids[:, :-1], attention_mask=causal, use_cache=False).last_hidden_state
            total = torch.zeros((), device=ids.device)
            pairs = hidden.flatten(0, 1).split(args.loss_chunk), ids[:, 1:].flatten().split(args.loss_chunk)
            for x, y in zip(*pairs, strict=True):
                total = total + checkpoint(chunk_loss, x, y, use_reentrant=False)
            loss = total / ids[:, 1:].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
