"""The other half of the learning comparison: a plain PyTorch loop around transformers' Qwen2.

    python -m experiments.learning.torch_loop --folder learning-run --seeds 0 1 --compile

From ours it takes only what must be the same: the configuration's numbers, the initial weights (`ours-SEED/initial/`,
in Hugging Face's format), and the rows of each step (`train.data.mixture`, NumPy). Model, mask, loss, optimizer,
schedule, clipping and evaluation are PyTorch's and transformers', or written here. Weights, gradients and moments are
float32; products are bfloat16 by `torch.autocast` where the configuration says bfloat16. The residual stream stays
float32 then, which is what autocast does; in ours it is bfloat16.
"""

import contextlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

# JAX comes with the data; it is not to take the card's memory. It reads this when it is imported.
os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np
import torch
import transformers

from experiments.learning.ours import command_line, configuration
from qwen_jax.errors import InputError
from train.config import RunConfig
from train.data.batch import Batch
from train.data.loader import whole_batches
from train.data.mixture import Mixture
from train.data.rows import PackedRows
from train.observe.metrics import MetricsLog
from train.optimizer import Schedule


def learning_rate(schedule: Schedule, step: int) -> float:
    """Linear warm-up that begins above zero, then a cosine down to the final fraction; steps count from 0."""
    if step < schedule.warmup_steps:
        return schedule.learning_rate * (step + 1) / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / (schedule.steps - schedule.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return schedule.learning_rate * (schedule.final_fraction + (1 - schedule.final_fraction) * cosine)


def summed_loss(model: Any, batch: Batch, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """Summed cross-entropy of a batch in nats, and how many tokens it is of.

    Documents see only themselves: a dense mask, causal within a segment; padding sees only itself. A token is a target
    where the one before it is of the same document.
    """
    tokens, positions, segments = (
        torch.as_tensor(x, dtype=torch.long).to(device) for x in (batch.tokens, batch.positions, batch.segment_ids)
    )
    length = tokens.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
    mask = (same & causal) | torch.eye(length, dtype=torch.bool, device=device)
    counted = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    targets = torch.where(counted, tokens[:, 1:], -100)
    with torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext():
        out = model(
            input_ids=tokens, position_ids=positions, attention_mask={"full_attention": mask[:, None]}, use_cache=False
        )
    logits = out.logits[:, :-1].float().flatten(0, 1)
    total = torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")
    return total, float(batch_weight(batch))


def batch_weight(batch: Batch) -> int:
    """How many tokens of a batch are targets."""
    segments = batch.segment_ids
    return int(((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)).sum())


def train(run: RunConfig, initial: Path, output: Path, compile_model: bool = False, limit: float = math.inf) -> bool:
    """Trains, and writes a log like that of `train.run`.

    Args:
      run: with one stage, a cosine schedule and no accumulation.
      initial: Hugging Face folder of the weights to begin with.
      output: folder that takes `metrics.jsonl` and `launch.json`.
      compile_model: whether the model goes through torch.compile.
      limit: seconds after which the run is given up.

    Returns:
      Whether it was finished.

    Raises:
      InputError: a run that this loop does not do, or no initial weights.
    """
    begin = time.perf_counter()
    if len(run.stages) != 1 or run.stages[0].schedule.schedule != "cosine" or run.step.dtype == "float16":
        raise InputError("The PyTorch loop does one stage with a cosine schedule, in float32 or bfloat16.")
    if not initial.is_dir():
        raise InputError(f"{initial} is not there. It is written by experiments.learning.ours; run that first.")
    stage, device = run.stages[0], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, run.step.dtype)
    mixture = Mixture(run.mixture_stages(), {name: PackedRows(path) for name, path in run.data.items()}, run.seed)
    held_out = {}
    for name, path in run.held_out.items():
        rows = PackedRows(path)
        held_out[name] = whole_batches(rows.take(range(len(rows))), stage.batch_size)
    model = transformers.Qwen2ForCausalLM.from_pretrained(initial, dtype=torch.float32, attn_implementation="sdpa")
    model.to(device).train()
    decayed = [p for name, p in model.named_parameters() if not name.endswith(("bias", "norm.weight"))]
    others = [p for name, p in model.named_parameters() if name.endswith(("bias", "norm.weight"))]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": run.optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(run.optimizer.beta1, run.optimizer.beta2),
        eps=run.optimizer.eps,
        fused=device.type == "cuda",
    )
    forward = torch.compile(model) if compile_model else model
    output.mkdir(parents=True, exist_ok=True)
    _record_launch(output, run, device, compile_model)
    log = MetricsLog(output / "metrics.jsonl")

    def evaluate(step: int) -> None:
        numbers = {}
        for name, batches in held_out.items():
            with torch.no_grad():
                sums = [summed_loss(forward, batch, device, dtype) for batch in batches]
            numbers[f"held_out_{name}_loss"] = float(sum(s for s, _ in sums)) / sum(w for _, w in sums)
        log.write({"step": step, **numbers})
        print(f"torch, seed {run.seed}, step {step}: {numbers}", flush=True)

    with contextlib.closing(log):
        evaluate(0)
        last = time.perf_counter()
        for step in range(stage.steps):
            rate = learning_rate(stage.schedule, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = mixture[step]
            total, weight = summed_loss(forward, batch, device, dtype)
            loss = total / weight
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            numbers = {"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": rate, "weight": weight}
            now = time.perf_counter()
            log.write({"step": step + 1, **numbers, "tokens_per_second": batch.tokens.size / (now - last)})
            last = now
            if step + 1 == stage.steps or (run.loop.evaluate_every and (step + 1) % run.loop.evaluate_every == 0):
                evaluate(step + 1)
                last = time.perf_counter()
            if last - begin > limit and step + 1 < stage.steps:
                return False
    return True


def _record_launch(output: Path, run: RunConfig, device: torch.device, compile_model: bool) -> None:
    launch = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "compile": compile_model,
        "seed": run.seed,
        "dtype": run.step.dtype,
    }
    (output / "launch.json").write_text(json.dumps(launch) + "\n", encoding="utf-8")


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--compile", action="store_true", help="by torch.compile")
    args = parser.parse_args()
    for seed in args.seeds:
        run = configuration(args, seed)
        output = Path(run.output).parent / f"torch-{seed}"
        if not train(run, Path(run.output) / "initial", output, args.compile, args.limit):
            raise SystemExit(f"Seed {seed} was not finished after {args.limit:g} s, and was given up.")


if __name__ == "__main__":
    main()
