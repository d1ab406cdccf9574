"""The commands `qwen-jax train sft`, `reward` and `dpo`: from arguments to a tuning run."""

import argparse
import dataclasses
from collections.abc import Sequence

from qwen_jax.errors import InputError
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
from train.dpo import DpoConfig
from train.fields import as_json, set_fields
from train.loop import LoopConfig
from train.pretrain import PretrainConfig
from train.reward import RewardConfig
from train.tune import tune
from train.tune_config import Method, ObjectiveConfig, TuneConfig, TuneStage, load
from train.tuned import Formats

_OBJECTIVES: dict[Method, ObjectiveConfig] = {"sft": PretrainConfig(), "reward": RewardConfig(), "dpo": DpoConfig()}
_ABOUT = {
    "sft": "Fine-tune a model on conversations: the loss is on what the assistant says.",
    "reward": "Train a reward model on pairs of a chosen and a rejected answer.",
    "dpo": "Train a model to prefer chosen over rejected answers, bound to a reference model.",
}
_COLUMNS = {"sft": "messages, or prompt and completion", "pairs": "prompt, chosen and rejected"}
_RATES = {"sft": 7e-6, "reward": 1e-5, "dpo": 7e-7}
_SET = """\
fields to change, such as stages.0.length=32768 stages.0.learning_rate=1e-5 mesh.fsdp=8 step.remat=full
loop.evaluate_every=50 objective.{} examples.trained=last; --print-config shows all"""
_FIELD = {"sft": "z_loss=1e-4", "reward": "centering=0.01", "dpo": "beta=0.3"}
_AFTER = """\
The same command resumes from the newest checkpoint, or does nothing if the run has ended. The tuned model is
written to OUTPUT/model. `qwen-jax data show FILE --model DIR` shows what is trained. See docs/post_training.md."""


def main(method: Method, argv: Sequence[str], formats: Formats) -> int:
    """`qwen-jax train sft`, `reward` and `dpo`.

    Args:
      method: which of them.
      argv: arguments after the command's name.
      formats: reads and writes models.

    Returns:
      The exit status: 0, or 128 and the number of the signal that stopped the run after a checkpoint.

    Raises:
      InputError: a configuration, data or a folder that does not fit.
    """
    kind = "sft" if method == "sft" else "pairs"
    parser = argparse.ArgumentParser(
        f"qwen-jax train {method}",
        description=f"{_ABOUT[method]}\n{_AFTER}",
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add_list(parser, "--data", "FILE", f"JSONL, Parquet or a datasets folder: {_COLUMNS[kind]}")
    add_tuning_arguments(parser, "examples", "TuneConfig")
    add_run_arguments(parser, _SET.format(_FIELD[method]))
    options = parser.parse_args(list(argv))
    config = configuration(method, options)
    if options.profile:
        config = dataclasses.replace(config, profile=steps_to_trace(options.profile))
    if options.print_config:
        print(to_json(as_json(config), indent=2))
        return 0
    join_if_asked(options)
    stopped_by = tune(config, formats)
    return 128 + stopped_by if stopped_by else 0


def configuration(method: Method, options: argparse.Namespace) -> TuneConfig:
    """The configuration of a file, or of plain arguments.

    Args:
      method: of the command.
      options: its parsed arguments.

    Raises:
      InputError: arguments that are missing or contradict each other, or a value that does not fit.
    """
    check_given(options, ("model", "data", "output"), ("held_out", "lora"))
    if options.config is not None:
        config = load(options.config, options.set)
    else:
        config = TuneConfig(
            output=options.output,
            model=options.model,
            data=named(options.data),
            held_out=named(options.held_out),
            objective=_OBJECTIVES[method],
            stages=(TuneStage(learning_rate=_RATES[method], epochs=2.0 if method == "sft" else 1.0),),
            loop=LoopConfig(evaluate_every=100 if options.held_out else 0),
        )
        if options.lora:
            lora = LoRA(whole=("score",)) if method == "reward" else LoRA()
            rate = dataclasses.replace(config.stages[0], learning_rate=10 * _RATES[method])
            config = dataclasses.replace(config, step=dataclasses.replace(config.step, lora=lora), stages=(rate,))
        config = set_fields(config, *options.set)
    if config.method != method:
        raise InputError(f"The configuration is one of `qwen-jax train {config.method}`. Use that command.")
    return config
