"""transformers' continuous batching on the requests of part (a), in a process without JAX on the device."""

import argparse
import inspect
import time
from typing import Any

import numpy as np

from experiments.decode.benchmark import say
from experiments.serving.cases import file_lengths
from experiments.serving.sizes import SIZES
from qwen_jax.published import published


def make_model(name: str) -> Any:
    """A model with random weights, on the GPU if there is one."""
    import torch
    import transformers

    config = published(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    try:
        with torch.device(device):
            settings = transformers.Qwen2Config(**config.to_hf(), attn_implementation="sdpa")
            model = transformers.Qwen2ForCausalLM(settings).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    return model


def run(args: argparse.Namespace) -> None:
    """Serves the requests all at once, after some that are not counted, and prints a line."""
    import torch
    import transformers

    size = SIZES[args.size]
    model, config = make_model(size.model), published(size.model)
    pairs = file_lengths(size, size.peer_requests)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, min(config.vocab_size, 150_000), i).tolist() for i, _ in pairs]
    most = max(o for _, o in pairs)
    generation = transformers.GenerationConfig(do_sample=False, max_new_tokens=most, eos_token_id=-1, pad_token_id=0)
    settings: dict[str, Any] = {"allow_block_sharing": False}
    if args.peer_tokens:
        settings["max_batch_tokens"] = args.peer_tokens
    if not torch.cuda.is_available():
        # Without a GPU it cannot tell how much memory there is.
        settings |= {"num_blocks": 64, "max_batch_tokens": 256, "page_size": 32}
    known = inspect.signature(transformers.ContinuousBatchingConfig).parameters
    batching = transformers.ContinuousBatchingConfig(**{k: v for k, v in settings.items() if k in known})
    with (
        torch.no_grad(),
        model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=batching, block=True, timeout=30
        ) as manager,
    ):
        serve(manager, prompts[:8], [4] * min(8, len(prompts)))
        seconds, tokens = serve(manager, prompts, [o for _, o in pairs])
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
    say(
        what="transformers, continuous batching",
        transformers=transformers.__version__,
        torch=torch.__version__,
        attention=model.config._attn_implementation,
        requests=len(pairs),
        seconds=seconds,
        output_tokens=tokens,
        output_tokens_per_s=tokens / seconds,
        peak_gb=peak,
    )


def serve(manager: Any, prompts: list[list[int]], new: list[int]) -> tuple[float, int]:
    """Adds all requests, and waits for them: seconds and tokens.

    Raises:
      RuntimeError: a request failed, or the manager has stopped.
    """
    begin = time.perf_counter()
    for ids, count in zip(prompts, new, strict=True):
        manager.add_request(ids, max_new_tokens=count)
    left, tokens = len(prompts), 0
    while left:
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("transformers' manager has stopped.")
            continue
        if result.error is not None:
            raise RuntimeError(f"transformers failed: {result.error}")
        if result.is_finished():
            left -= 1
            tokens += len(result.generated_tokens)
    return time.perf_counter() - begin, tokens
