"""The yardstick of post-training: TRL's `SFTTrainer` and `DPOTrainer` on rows of random tokens.

Weights, gradients and moments are float32, products bfloat16 by autocast, AdamW is PyTorch's fused one: model and
optimiser come from `experiments.train.torch_step`. `SFTTrainer` packs rows and computes its loss in chunks, on trained
tokens alone. `DPOTrainer` computes the log-probabilities of the reference before training. Written for TRL 1.13; the
names of arguments are the same in 1.16.
"""

import argparse
import importlib.util
import itertools
import tempfile
import time
from typing import Any

import accelerate
import datasets
import numpy as np
import tokenizers
import torch
import transformers
import trl

from experiments.decode.benchmark import say
from experiments.train import torch_step
from qwen_jax.config import ModelConfig
from train.data.examples import Example, Pair

_END = "<|end|>"


class _Ends(transformers.TrainerCallback):
    """The times at which steps end on the device."""

    def __init__(self) -> None:
        self._ends: list[Any] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._ends.append(event)
        else:
            self._ends.append(time.perf_counter())

    def seconds(self, warmup: int) -> np.ndarray:
        """Seconds of each step after the first ones."""
        if not torch.cuda.is_available():
            return np.diff(self._ends[warmup:])
        torch.cuda.synchronize()
        ends = self._ends[warmup:]
        return np.asarray([a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(ends)])


def measure(
    args: argparse.Namespace, shape: ModelConfig, kind: str, rows: list[list[Example]] | list[list[Pair]]
) -> tuple[float, dict[str, Any]]:
    """Times the training step.

    Args:
      args: of the command line of `benchmark.py`.
      shape: the architecture.
      kind: "sft" or "dpo".
      rows: examples or pairs of each row of all steps, in rows of `args.length` tokens.

    Returns:
      Seconds of a step, and further entries of the report.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    flash = importlib.util.find_spec("flash_attn") is not None
    attention = args.attention or ("flash_attention_2" if flash else "sdpa")
    versions = {x.__name__: x.__version__ for x in (trl, transformers, accelerate, datasets, torch)}
    say(**versions, device=torch.cuda.get_device_name() if cuda else "cpu", date=time.strftime("%Y-%m-%d"))
    torch.backends.cuda.matmul.allow_tf32 = True
    model, optimizer = torch_step.make(args, shape, device)
    if attention != "sdpa":
        model.set_attn_implementation(attention)
    more: dict[str, Any] = {"attention": attention, "liger": args.liger, "accumulation": args.accumulation}
    ends = _Ends()
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "max_steps": args.warmup + args.steps + 1,
            "bf16": True,
            "use_cpu": not cuda,
            "gradient_checkpointing": args.remat == "full",
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "gradient_accumulation_steps": args.accumulation,
            "max_grad_norm": 1.0,
            "lr_scheduler_type": "constant",
            "logging_steps": 10**6,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_liger_kernel": args.liger,
        }
        common = {
            "model": model,
            "processing_class": _tokenizer(shape),
            "optimizers": (optimizer, None),
            "callbacks": [ends],
        }
        if kind == "sft":
            # Without kernels for packed rows, several documents in a row need a dense mask, or attend to one another.
            packing = args.packing or ("wrapped" if args.documents == 1 and attention == "sdpa" else "bfd")
            more["packing"] = packing
            config = trl.SFTConfig(
                **settings,
                per_device_train_batch_size=args.batch // args.accumulation,
                max_length=args.length,
                packing=True,
                packing_strategy=packing,
                **({} if args.liger else {"loss_type": "chunked_nll"}),
            )
            trainer = trl.SFTTrainer(**common, args=config, train_dataset=_examples(rows))
        else:
            config = trl.DPOConfig(
                **settings,
                per_device_train_batch_size=args.batch * args.documents // 2 // args.accumulation,
                max_length=args.length,
                precompute_ref_log_probs=True,
                precompute_ref_batch_size=1,
            )
            trainer = trl.DPOTrainer(**common, args=config, train_dataset=_pairs(rows))
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        loss = trainer.train().training_loss
    seconds = ends.seconds(args.warmup)
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    more |= {"peak_gb": peak / 1e9, "slowest_ms": float(seconds.max()) * 1e3, "mean_loss": float(loss)}
    return float(np.median(seconds)), more


def _tokenizer(shape: ModelConfig) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer whose token i is the word i, but for the last, which ends texts."""
    words = {str(i): i for i in range(shape.vocab_size - 1)} | {_END: shape.vocab_size - 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END)


def _examples(rows: Any) -> datasets.Dataset:
    """Tokenized examples, with the labels of those tokens that are trained."""
    examples: list[Example] = [example for row in rows for example in row]
    labels = [np.where(example.trained, example.ids, -100).tolist() for example in examples]
    return datasets.Dataset.from_dict({"input_ids": [x.ids.tolist() for x in examples], "labels": labels})


def _pairs(rows: Any) -> datasets.Dataset:
    """Pairs as texts, for `DPOTrainer` tokenizes them itself; the last token of an answer ends the text."""

    def text(ids: np.ndarray) -> str:
        return " ".join(map(str, ids.tolist()))

    table: dict[str, list[str]] = {"prompt": [], "chosen": [], "rejected": []}
    for pair in (pair for row in rows for pair in row):
        prompt = pair.chosen.ids[~pair.chosen.trained]
        table["prompt"].append(text(prompt) + " ")
        for name, example in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            table[name].append(f"{text(example.ids[len(prompt) : -1])} {_END}")
    return datasets.Dataset.from_dict(table)
