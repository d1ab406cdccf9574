"""The commands `qwen-jax train grpo` and `qwen-jax score --prompts`: from arguments to a GRPO run, or to scores."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from qwen_jax.lora import LoRA
from train.command import (
    add_job_arguments,
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
from train.grpo_run import score_prompts, train_grpo
from train.loop import LoopConfig
from train.tuned import Formats

_ABOUT = """\
Train a model by reinforcement learning with GRPO: it answers prompts, and reward functions judge the answers.
The same command resumes from the newest checkpoint, or does nothing if the run has ended. The tuned model is
written to OUTPUT/model, and what was sampled to OUTPUT/rollouts. See docs/grpo.md."""
_ABOUT_SCORES = """\
Sample several answers to each prompt, and score them with reward functions: one JSON object a line, with the number of
the prompt and the scores of its answers. `qwen-jax train grpo --order` reads the file. See docs/grpo.md."""
_SET = """\
fields to change, such as queries=64 sampling.group_size=16 sampling.max_new_tokens=1024 learning_rate=1e-6
objective.kl_weight=0 objective.aggregation=token-mean rewards.0.weight=0.5 engine.tensor=2 mesh.fsdp=8;
--print-config shows all"""
_SET_SCORES = """\
fields to change, such as sampling.max_new_tokens=1024 prompt_length=2048 rewards.0.weight=0.5 engine.tensor=2
mesh.fsdp=8; --print-config shows all"""


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
    _add_prompts_and_rewards(parser)
    add_tuning_arguments(parser, "prompts", "GrpoRunConfig")
    parser.add_argument("--order", metavar="FILE", help="order prompts by the variance of these scores, highest first")
    add_run_arguments(parser, _SET)
    options = parser.parse_args(list(argv))
    config = configuration(options)
    if options.profile:
        config = dataclasses.replace(config, profile=steps_to_trace(options.profile))
    if options.print_config:
        print(to_json(as_json(config), indent=2))
        return 0
    join_if_asked(options)
    stopped_by = train_grpo(config, formats)
    return 128 + stopped_by if stopped_by else 0


def score(argv: Sequence[str], formats: Formats) -> int:
    """`qwen-jax score --prompts`.

    Args:
      argv: arguments after the command's name.
      formats: reads models.

    Returns:
      The exit status, 0.

    Raises:
      InputError: a configuration, prompts or rewards that do not fit, or a reward that fails.
    """
    parser = argparse.ArgumentParser(
        "qwen-jax score", description=_ABOUT_SCORES, formatter_class=argparse.RawTextHelpFormatter
    )
    _add_prompts_and_rewards(parser)
    parser.add_argument("--model", metavar="DIR", help="checkpoint that answers, or a Hub id; with its tokenizer")
    parser.add_argument("--samples", type=int, metavar="N", help="answers to each prompt (sampling.group_size, 8)")
    parser.add_argument("--output", metavar="FILE", help="file of scores; it appears when it is complete")
    parser.add_argument(
        "--config", metavar="FILE.py[:FUNCTION]", help="a function that returns a GrpoRunConfig, instead"
    )
    add_job_arguments(parser, _SET_SCORES)
    options = parser.parse_args(list(argv))
    check_given(options, ("model", "prompts", "reward"))
    if not options.output:
        raise InputError("--output is missing. Give the file that scores are written to.")
    if options.samples is not None and options.samples < 2:
        raise InputError(f"--samples must be at least 2, got {options.samples}: one score has no variance.")
    if options.config is not None:
        config = load(options.config, options.set)
    else:
        given = options.output, options.model, named(options.prompts), _rewards(options)
        config = set_fields(GrpoRunConfig(*given), *options.set)
    if options.samples is not None:
        sampling = dataclasses.replace(config.sampling, group_size=options.samples)
        config = dataclasses.replace(config, sampling=sampling)
    if options.print_config:
        print(to_json(as_json(config), indent=2))
        return 0
    join_if_asked(options)
    score_prompts(config, formats, Path(options.output))
    return 0


def _add_prompts_and_rewards(parser: argparse.ArgumentParser) -> None:
    add_list(parser, "--prompts", "FILE", "JSONL, Parquet or a datasets folder: prompt, and columns of rewards")
    rewards = "math, code, instructions, verification, json_schema, format, length, reward_model, or FILE.py:function"
    add_list(parser, "--reward", "NAME", rewards)


def _rewards(options: argparse.Namespace) -> tuple[RewardUse, ...]:
    return tuple(RewardUse(spec) for spec in options.reward)


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
        rewards=_rewards(options),
        held_out=named(options.held_out),
        order=options.order,
        loop=LoopConfig(evaluate_every=20 if options.held_out else 0),
    )
    if options.lora:
        step = dataclasses.replace(config.step, lora=LoRA())
        config = dataclasses.replace(config, step=step, learning_rate=10 * config.learning_rate)
    return set_fields(config, *options.set)
