"""The post-training recipes of the Qwen2.5 technical report (arXiv:2412.15115, sections 4.1 and 4.2).

    qwen-jax train sft --config experiments/post/qwen2_5.py:sft --set model=DIR data.chats=FILE output=runs/sft
    qwen-jax train sft --config experiments/post/qwen2_5.py:sft_long --set model=DIR data.short=FILE data.long=FILE ...
    qwen-jax train reward --config experiments/post/qwen2_5.py:reward --set model=DIR data.pairs=FILE ...
    qwen-jax train dpo --config experiments/post/qwen2_5.py:dpo --set model=DIR base=DIR data.pairs=FILE ...

The report gives, for supervised fine-tuning, 2 epochs at 32,768 tokens, a learning rate from 7e-6 to 7e-7, weight
decay 0.1 and clipping at 1.0; for long contexts a first stage of short examples and a second one of short and long
examples up to 262,144 tokens; for DPO one epoch over 150,000 pairs at 7e-7 with the online merging optimiser. It gives
no batch sizes, no beta and no settings of the merging: those here are placeholders of a usual size.
"""

from train.dpo import DpoConfig
from train.merging import Merging
from train.optimizer import AdamW
from train.pretrain import PretrainConfig
from train.reward import RewardConfig
from train.step import StepConfig
from train.tune_config import TuneConfig, TuneStage

_MODEL = "runs/qwen2.5-7b/model"


def sft() -> TuneConfig:
    """Supervised fine-tuning of all models but Turbo."""
    return TuneConfig(
        output="runs/qwen2.5-7b-sft",
        model=_MODEL,
        data={"chats": "data/chats.jsonl"},
        objective=PretrainConfig(),
        stages=(TuneStage(length=32_768, batch_size=64, epochs=2, learning_rate=7e-6, final_fraction=0.1),),
        mesh={"fsdp": 8},
        optimizer=AdamW(weight_decay=0.1, clip_norm=1.0),
        step=StepConfig(remat="full"),
    )


def sft_long() -> TuneConfig:
    """Supervised fine-tuning for long contexts: short examples first, then short and long ones together."""
    return TuneConfig(
        output="runs/qwen2.5-turbo-sft",
        model="runs/qwen2.5-turbo/model",
        data={"short": "data/chats.jsonl", "long": "data/long-chats.jsonl"},
        objective=PretrainConfig(),
        stages=(
            TuneStage(length=32_768, batch_size=64, epochs=2, data=("short",), final_fraction=1.0),
            TuneStage(
                length=262_144,
                batch_size=8,
                epochs=1,
                data=("short", "long"),
                warmup_fraction=0.0,
                mesh={"fsdp": 8, "context": 4},
            ),
        ),
        mesh={"fsdp": 32},
        optimizer=AdamW(weight_decay=0.1, clip_norm=1.0),
        step=StepConfig(remat="full"),
    )


def reward() -> TuneConfig:
    """A reward model, with scores that are centred at zero."""
    return TuneConfig(
        output="runs/qwen2.5-7b-rm",
        model="runs/qwen2.5-7b-sft/model",
        data={"pairs": "data/pairs.jsonl"},
        objective=RewardConfig(centering=0.01),
        stages=(TuneStage(length=8192, batch_size=64, epochs=1, learning_rate=7e-6),),
        mesh={"fsdp": 8},
        step=StepConfig(remat="full"),
    )


def dpo() -> TuneConfig:
    """DPO with the online merging optimiser, by the settings of its authors' script."""
    return TuneConfig(
        output="runs/qwen2.5-7b-dpo",
        model="runs/qwen2.5-7b-sft/model",
        base=_MODEL,
        data={"pairs": "data/pairs.jsonl"},
        objective=DpoConfig(beta=0.1),
        stages=(TuneStage(length=8192, batch_size=64, epochs=1, learning_rate=7e-7),),
        mesh={"fsdp": 8},
        optimizer=AdamW(weight_decay=0.0),
        merging=Merging.released(),
        step=StepConfig(remat="full"),
    )
