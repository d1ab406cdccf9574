"""A 31M-parameter Qwen2.5 on the text of a Python installation: what the learning comparison trains, in both loops.

    python -m experiments.learning.data --folder learning-run
    qwen-jax train pretrain --config experiments/learning/small.py --set output=learning-run/ours-0

The second command is one of our runs alone; `ours.py` does it for several seeds, for comparison. Hardware: one H200.
"""

from pathlib import Path

from qwen_jax.config import ModelConfig
from qwen_jax.tokenizer import CONTROL_TOKENS
from train.config import RunConfig, Stage
from train.loop import CheckpointConfig, LoopConfig
from train.optimizer import Schedule
from train.pretrain import PretrainConfig
from train.step import StepConfig

VOCAB_SIZE = 16_384
LENGTH = 1024


def config(folder: str = "learning-run", seed: int = 0) -> RunConfig:
    """1,500 steps of 65,536 tokens, cosine to a tenth of the peak.

    Args:
      folder: where `data.py` has put tokenizer and rows.
      seed: of weights and data order.
    """
    model = ModelConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1408,
        num_layers=8,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        rope_theta=1e4,
        max_position_embeddings=LENGTH,
        bos_token_id=None,
        # The first of the control tokens, which follow the learned ones.
        eos_token_ids=(VOCAB_SIZE - len(CONTROL_TOKENS),),
        dtype="float32",
    )
    place = Path(folder)
    return RunConfig(
        output=str(place / f"ours-{seed}"),
        model=model,
        tokenizer=str(place / "tokenizer"),
        data={"text": str(place / "train")},
        held_out={"text": str(place / "held-out")},
        stages=(Stage(Schedule(1500, 1e-3, warmup_steps=100), LENGTH, 64, {"text": 1}),),
        seed=seed,
        objective=PretrainConfig(loss_chunk=16_384),
        step=StepConfig(remat="dots"),
        loop=LoopConfig(evaluate_every=100),
        checkpoints=CheckpointConfig(every=0),
    )
