"""The yardstick of whole GRPO steps: TRL's `GRPOTrainer`, which generates with transformers' own `generate`.

It reads the folder and the prompts of `benchmark.py`. Only ids of the small tokenizer are sampled there, so that
lengths are spread; here the others are suppressed, to the same end. No KL term, one step for each generation, and
advantages of groups, as in our run. Written for TRL 1.13.
"""

import argparse
import json
import tempfile
import time
from typing import Any

import datasets
import numpy as np
import torch
import transformers
import trl

from experiments.post.learning import IDS
from experiments.post.trl_step import _Ends


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Times whole steps: generation, rewards and update; the first is left out.

    Args:
      args: of the command line of `benchmark.py`.

    Returns:
      Entries of the report.
    """
    cuda = torch.cuda.is_available()
    torch.backends.cuda.matmul.allow_tf32 = True
    samples, micro = args.queries * args.group, min(args.trl_micro, args.queries * args.group)
    rows = [json.loads(line) for line in (args.folder / "prompts.jsonl").read_text().splitlines()]
    folder = str(args.folder / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.trl_weights))
    lengths: list[int] = []

    def odd(completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.extend(len(ids) for ids in completion_ids)
        return [float(sum(ids) % 2) for ids in completion_ids]

    ends = _Ends()
    with tempfile.TemporaryDirectory() as output:
        config = trl.GRPOConfig(
            output_dir=output,
            max_steps=3,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=samples // micro,
            # One generation for each optimiser step.
            steps_per_generation=samples // micro,
            num_generations=args.group,
            max_completion_length=args.new,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            generation_kwargs={"suppress_tokens": list(range(IDS, model.config.vocab_size))},
            beta=0.0,
            loss_type="grpo",
            use_vllm=False,
            bf16=True,
            use_cpu=not cuda,
            gradient_checkpointing=args.remat == "full",
            logging_steps=10**6,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=odd,
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[ends],
        )
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    seconds = float(np.median(ends.seconds(0)))
    return {
        "step_s": seconds,
        "samples_per_s": samples / seconds,
        "mean_response": float(np.mean(lengths)),
        "weights": args.trl_weights,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        **{x.__name__: x.__version__ for x in (trl, transformers, torch)},
        "date": time.strftime("%F"),
    }
