"""The command `qwen-jax train grpo`: from arguments to a GRPO run."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from qwen_jax.files import to_json
from qwen_jax.lora import LoRA
from train.command import (
    add_list,
    add_run_arguments,
    add_tuning_arguments,
    check_given,
    join_if_asked,
    named,
    steps_to_trace,
)
from train.fields import as_json, set_fields
from train.grpo_config import GrpoRunConfig, RewardUse, load
from train.grpo_run import train_grpo
from train.loop import LoopConfig
from train.tuned import Formats

_ABOUT = """\
Train a model by reinforcement learning with GRPO: it answers prompts, and reward functions judge the answers.
The same command resumes from the newest checkpoint, or does nothing if the run has ended. The tuned model is
written to OUTPUT/model, and what was sampled to OUTPUT/rollouts. See docs/grpo.md."""
_SET = """\
fields to change, such as queries=64 sampling.group_size=16 sampling.max_new_tokens=1024 learning_rate=1e-6
objective.kl_weight=0 objective.aggregation=token-mean rewards.0.weight=0.5 engine.tensor=2 mesh.fsdp=8;
--print-config shows all"""


def main(argv: Sequence[str], formats: Formats) -> int:
    """`qwen-jax train grpo`.

    Args:
      argv: arguments after the command's name.
      formats: reads and writes models.

    Returns:
      The exit status: 0, or 128 and the number of the signal that stopped the run after a checkpoint.

    Raises:
      InputError: a configuration, prompts, rewards or a folder that does not fit.
    """
    parser = argparse.ArgumentParser(
        "qwen-jax train grpo", description=_ABOUT, formatter_class=argparse.RawTextHelpFormatter
    )
    add_list(parser, "--prompts", "FILE", "JSONL, Parquet or a datasets folder: prompt, and columns of rewards")
    rewards = "math, code, instructions, verification, json_schema, format, length, reward_model, or FILE.py:function"
    add_list(parser, "--reward", "NAME", rewards)
    add_tuning_arguments(parser, "prompts", "GrpoRunConfig")
    parser.add_argument("--order", metavar="FILE", help="order prompts by the variance of these scores, highest first")
    parser.add_argument(
        "--write-scores", metavar="FILE", help="do not train: score a group of answers to each prompt, for --order"
    )
    add_run_arguments(parser, _SET)
    options = parser.parse_args(list(argv))
    config = configuration(options)
    if options.profile:
        config = dataclasses.replace(config, profile=steps_to_trace(options.profile))
    if options.print_config:
        print(to_json(as_json(config), indent=2))
        return 0
    join_if_asked(options)
    scores = None if options.write_scores is None else Path(options.write_scores)
    stopped_by = train_grpo(config, formats, write_scores=scores)
    return 128 + stopped_by if stopped_by else 0


def configuration(options: argparse.Namespace) -> GrpoRunConfig:
    """The configuration of a file, or of plain arguments.

    Args:
      options: parsed arguments of the command.

    Raises:
      InputError: arguments that are missing or contradict each other, or a value that does not fit.
    """
    check_given(options, ("model", "prompts", "reward", "output"), ("held_out", "order", "lora"))
    if options.config is not None:
        return load(options.config, options.set)
    config = GrpoRunConfig(
        output=options.output,
        model=options.model,
        prompts=named(options.prompts),
        rewards=tuple(RewardUse(spec) for spec in options.reward),
        held_out=named(options.held_out),
        order=options.order,
        loop=LoopConfig(evaluate_every=20 if options.held_out else 0),
    )
    if options.lora:
        step = dataclasses.replace(config.step, lora=LoRA())
        config = dataclasses.replace(config, step=step, learning_rate=10 * config.learning_rate)
    return set_fields(config, *options.set)
