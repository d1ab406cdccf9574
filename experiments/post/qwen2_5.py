"""The post-training recipes of the Qwen2.5 technical report (arXiv:2412.15115, sections 4.1 to 4.3).

    qwen-jax train sft --config experiments/post/qwen2_5.py:sft --set model=DIR data.chats=FILE output=runs/sft
    qwen-jax train sft --config experiments/post/qwen2_5.py:sft_long --set model=DIR data.short=FILE data.long=FILE ...
    qwen-jax train reward --config experiments/post/qwen2_5.py:reward --set model=DIR data.pairs=FILE ...
    qwen-jax train dpo --config experiments/post/qwen2_5.py:dpo --set model=DIR base=DIR data.pairs=FILE ...
    qwen-jax score --config experiments/post/qwen2_5.py:grpo --output SCORES --set prompts.queries=FILE ...
    qwen-jax train grpo --config experiments/post/qwen2_5.py:grpo --set order=SCORES prompts.queries=FILE ...

The report gives, for supervised fine-tuning, 2 epochs at 32,768 tokens, a learning rate from 7e-6 to 7e-7, weight
decay 0.1 and clipping at 1.0; for long contexts a first stage of short examples and a second one of short and long
examples up to 262,144 tokens; for DPO one epoch over 150,000 pairs at 7e-7 with the online merging optimiser. It gives
no batch sizes, no beta and no settings of the merging: those here are placeholders of a usual size. For
GRPO, see `grpo`.
"""

from train.dpo import DpoConfig
from train.grpo_config import GrpoRunConfig, RewardUse
from train.merging import Merging
from train.optimizer import AdamW
from train.policy import GrpoConfig
from train.pretrain import PretrainConfig
from train.reward import RewardConfig
from train.sampler import SamplingConfig
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


def grpo() -> GrpoRunConfig:
    """Reinforcement learning with GRPO against the reward model (section 4.3, "Online RL").

    The report gives: 8 responses to each query; 2,048 samples in an episode and in a global batch, where a sample is a
    query with a response, so that an episode has 256 queries and one step; queries in the order of the variance of the
    reward model's scores of their responses, higher first. `qwen-jax score` writes the scores for `order`, of responses
    by the model that the run begins with.

    The report leaves open, and we choose: the loss of DeepSeekMath (arXiv:2402.03300, which the report cites for GRPO),
    with clips of 0.2, a KL term of k3 against the model that the run begins with at 0.04, means over the tokens of a
    sequence and then over sequences, and advantages divided by the standard deviation of their group; temperature 1 and
    2,048 new tokens; a constant learning rate of 1e-6, AdamW without weight decay; and one epoch over the queries.
    """
    return GrpoRunConfig(
        output="runs/qwen2.5-7b-grpo",
        model="runs/qwen2.5-7b-dpo/model",
        prompts={"queries": "data/queries.jsonl"},
        rewards=(RewardUse("reward_model", settings={"model": "runs/qwen2.5-7b-rm/model"}),),
        objective=GrpoConfig(kl_weight=0.04, clip_low=0.2, clip_high=0.2),
        sampling=SamplingConfig(group_size=8, max_new_tokens=2048, temperature=1.0),
        order="data/queries-scores.jsonl",
        queries=256,
        updates=1,
        epochs=1.0,
        prompt_length=2048,
        row_length=8192,
        learning_rate=1e-6,
        schedule="constant",
        mesh={"fsdp": 8},
        optimizer=AdamW(beta2=0.999, weight_decay=0.0),
        step=StepConfig(remat="full"),
    )
