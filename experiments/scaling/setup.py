"""What the small sweep trains: text, sizes, rates and batches; `sweep` also is the file of `qwen-jax scaling sweep`.

    qwen-jax scaling sweep --config experiments/scaling/setup.py:sweep --output small-sweep/runs

after `small_sweep.py` has put the rows into the folder `small-sweep`, or that in the environment variable SMALL_SWEEP.
"""

import dataclasses
import os
from collections.abc import Collection
from pathlib import Path

from qwen_jax.config import ModelConfig
from qwen_jax.tokenizer import CONTROL_TOKENS
from train.config import RunConfig, Stage
from train.loop import CheckpointConfig, LoopConfig
from train.optimizer import Schedule
from train.pretrain import PretrainConfig
from train.scaling.design import Point
from train.scaling.sweep import Sweep
from train.step import StepConfig


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes, for one machine.

    Attributes:
      megabytes: of text, at most.
      held_out_megabytes: of it.
      vocab_size: of the tokenizer.
      length: of a row, in tokens.
      head_dim: of all models.
      shapes: width and layers of the models of the sweep, the smallest first.
      target: width and layers of the model that the law is tested on.
      cells: (index of the shape, tokens) of the sweep.
      target_tokens: of a run of the target.
      learning_rates: of the coarse grid of each cell.
      batches: of the coarse grid, in tokens.
      most_runs: points of a cell, at most.
      dtype: of the computation.
      workers: processes that share the machine's devices.
      start: points of the grid that a cell begins with; by default all.
      most_steps: of a run of the sweep.
      pilot: a point of the grid that is run first, with two seeds, in every cell. It says how far seeds scatter, and
        which cells are near a fall of the loss: these are left out.
      whole: the law waits for the end of the sweep, if need be in several calls.
    """

    megabytes: float
    held_out_megabytes: float
    vocab_size: int
    length: int
    head_dim: int
    shapes: tuple[tuple[int, int], ...]
    target: tuple[int, int]
    cells: tuple[tuple[int, int], ...]
    target_tokens: int
    learning_rates: tuple[float, ...]
    batches: tuple[int, ...]
    most_runs: int
    dtype: str
    workers: int
    start: tuple[Point, ...] = ()
    most_steps: int | None = None
    pilot: Point | None = None
    whole: bool = False

    def model(self, width: int, layers: int) -> ModelConfig:
        """A model of the family: three times its width in the feed-forward layer, half as many heads for keys."""
        heads = width // self.head_dim
        return ModelConfig(
            vocab_size=self.vocab_size,
            hidden_size=width,
            intermediate_size=3 * width,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=heads // 2 if heads % 2 == 0 else 1,
            head_dim=self.head_dim,
            tie_word_embeddings=True,
            rope_theta=1e4,
            max_position_embeddings=self.length,
            bos_token_id=None,
            eos_token_ids=(self.vocab_size - len(CONTROL_TOKENS),),
            dtype="float32",
        )

    def base(self, folder: Path) -> RunConfig:
        """The run that all others are made of: cosine to a tenth after a tenth of warm-up.

        Args:
          folder: with tokenizer and rows.
        """
        return RunConfig(
            output=str(folder / "run"),
            model=self.model(*self.shapes[0]),
            tokenizer=str(folder / "tokenizer"),
            data={"text": str(folder / "train")},
            held_out={"text": str(folder / "held-out")},
            stages=(Stage(Schedule(1000, 1e-3, warmup_steps=100), self.length, 8, {"text": 1}),),
            objective=PretrainConfig(loss_chunk=16_384),
            step=StepConfig(dtype=self.dtype, remat="none"),  # type: ignore[arg-type]
            loop=LoopConfig(evaluate_every=10**6),
            checkpoints=CheckpointConfig(every=0),
        )

    def sweep(self, folder: Path, without: Collection[tuple[str, int]] = ()) -> Sweep:
        """The sweep that the law is fitted to.

        Args:
          folder: with tokenizer and rows.
          without: cells that are left out.
        """
        names = [f"w{width}x{layers}" for width, layers in self.shapes]
        cells = [(names[index], tokens) for index, tokens in self.cells]
        return Sweep(
            base=self.base(folder),
            sizes={name: self.model(*shape) for name, shape in zip(names, self.shapes, strict=True)},
            tokens=tuple(dict.fromkeys(tokens for _, tokens in self.cells)),
            cells=tuple(cell for cell in cells if cell not in without),
            learning_rates=self.learning_rates,
            batches=self.batches,
            flops=1e17,
            design="sequential",
            most_runs=self.most_runs,
            start=self.start,
            most_steps=self.most_steps,
        )

    def pilot_sweep(self, folder: Path) -> Sweep:
        """The pilot: one point of every cell, with two seeds. The first is a run of the sweep, too.

        Args:
          folder: with tokenizer and rows.
        """
        assert self.pilot is not None
        return dataclasses.replace(self.sweep(folder), design="grid", start=(self.pilot,), seeds=(0, 1))

    def target_sweep(self, folder: Path, learning_rate: float, batch: int) -> Sweep:
        """Runs of the target at a prediction, at half and twice of both, and further where the best is at the edge.

        Args:
          folder: with tokenizer and rows.
          learning_rate, batch: the prediction; the batch is a multiple of two rows.
        """
        return Sweep(
            base=self.base(folder),
            sizes={f"w{self.target[0]}x{self.target[1]}": self.model(*self.target)},
            tokens=(self.target_tokens,),
            learning_rates=(learning_rate / 2, learning_rate, 2 * learning_rate),
            batches=(batch // 2, batch, 2 * batch),
            flops=1e17,
            design="sequential",
            most_runs=self.most_runs,
        )


SETUPS = {
    # One H200: 54 runs of 1.1M to 3.4M parameters and more at the edges, then 14.7M, in under 9 minutes.
    "gpu": Setup(
        megabytes=90,
        held_out_megabytes=1.0,
        vocab_size=4096,
        length=256,
        head_dim=64,
        shapes=((128, 3), (192, 3), (256, 3)),
        target=(512, 4),
        cells=(
            *((0, 4_000_000), (0, 8_000_000), (0, 16_000_000)),
            *((1, 8_000_000), (2, 4_000_000), (2, 16_000_000)),
        ),
        target_tokens=16_000_000,
        learning_rates=(3e-3, 6e-3, 12e-3),
        batches=(4096, 8192, 16384),
        most_runs=12,
        dtype="bfloat16",
        workers=6,
    ),
    # One H200, some 25 minutes: every run ends far behind the fall of the loss, which small_sweep.md describes. Each
    # cell begins with a cross around 8,192 tokens that reaches down to 1,024.
    "second": Setup(
        megabytes=200,
        held_out_megabytes=1.0,
        vocab_size=4096,
        length=256,
        head_dim=64,
        shapes=((128, 3), (256, 3)),
        target=(512, 4),
        cells=((0, 32_000_000), (0, 64_000_000), (1, 32_000_000), (1, 64_000_000)),
        target_tokens=32_000_000,
        learning_rates=(4e-3, 6e-3, 9e-3),
        batches=(1024, 2048, 4096, 8192, 16384),
        most_runs=10,
        dtype="bfloat16",
        workers=6,
        start=((-1, 0), (0, 3), (1, 3), (2, 3), (1, 4)),
        most_steps=32_000,
        pilot=(1, 3),
        whole=True,
    ),
    # Two cores of a laptop: the same path with models that learn little.
    "cpu": Setup(
        megabytes=1.5,
        held_out_megabytes=0.02,
        vocab_size=512,
        length=32,
        head_dim=16,
        shapes=((32, 1), (64, 1)),
        target=(128, 1),
        cells=((0, 6144), (0, 12288), (1, 12288)),
        target_tokens=12288,
        learning_rates=(5e-3, 10e-3, 20e-3),
        batches=(128, 256, 512),
        most_runs=9,
        dtype="float32",
        workers=1,
    ),
}


def sweep() -> Sweep:
    """The sweep of the folder and the size in SMALL_SWEEP and SMALL_SWEEP_SIZE."""
    setup = SETUPS[os.environ.get("SMALL_SWEEP_SIZE", "gpu")]
    return setup.sweep(Path(os.environ.get("SMALL_SWEEP", "small-sweep")).absolute())
