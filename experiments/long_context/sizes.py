"""What `experiments.long_context.train_and_extend` trains, at which lengths, and how it is tested."""

import dataclasses
from pathlib import Path

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from train.evaluate import synthetic_ids

BYTES, VOCAB_SIZE = 256, 512
LAYOUT = synthetic_ids.IdLayout(BYTES, VOCAB_SIZE)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of training, after which the model is exported and read.

    Attributes:
      name: "trained" or "continued".
      length: tokens of a row.
      steps: how many.
      learning_rate: the peak.
      rope_theta: RoPE base.
      ratios: test lengths, over the length of the first stage.
    """

    name: str
    length: int
    steps: int
    learning_rate: float
    rope_theta: float
    ratios: tuple[int, ...]

    def model_folder(self, folder: Path) -> Path:
        """Where the model is exported to, in the folder of a seed."""
        return folder / ("model" if self.name == "trained" else f"model-{self.name}")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is trained, and how it is tested.

    Attributes:
      length: tokens of a row in training.
      layers, hidden: of the model; heads have 64 dimensions.
      steps, batch: of the training.
      learning_rate: the peak.
      continue_steps: of the continuation at four times the length; 0 leaves it out.
      megabytes: of text to train on, at most.
      ratios: test lengths of the trained model, over `length`.
      continued_ratios: the same of the continued model.
      samples: of each task, length and depth.
      depths: of the needles, in percent.
      windows: of held-out text.

    Raises:
      InputError: a batch that does not divide into rows of four times the length.
    """

    length: int = 1024
    layers: int = 8
    hidden: int = 512
    steps: int = 2000
    batch: int = 64
    learning_rate: float = 1e-3
    continue_steps: int = 400
    megabytes: float = 60.0
    ratios: tuple[int, ...] = (1, 4, 8)
    continued_ratios: tuple[int, ...] = (1, 4, 8, 16)
    samples: int = 20
    depths: tuple[float, ...] = (0, 25, 50, 75, 100)
    windows: int = 32

    def __post_init__(self) -> None:
        if self.continue_steps and self.batch % 4:
            raise InputError(f"The continuation needs a --batch that is a multiple of 4, got {self.batch}.")

    def stages(self) -> list[Stage]:
        """The stages of training, in order."""
        first = Stage("trained", self.length, self.steps, self.learning_rate, 1e4, self.ratios)
        rate = self.learning_rate / 3
        second = Stage("continued", 4 * self.length, self.continue_steps, rate, 1e6, self.continued_ratios)
        return [first, second] if self.continue_steps else [first]

    def longest(self) -> int:
        """The longest test length, in tokens."""
        return self.length * max(ratio for stage in self.stages() for ratio in stage.ratios)

    def model(self, stage: Stage) -> ModelConfig:
        """The architecture as a stage trains it."""
        heads = self.hidden // 64
        return ModelConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=self.hidden,
            intermediate_size=11 * self.hidden // 4,
            num_layers=self.layers,
            num_heads=heads,
            num_kv_heads=max(heads // 4, 1),
            head_dim=64,
            # With an untied output head, needles were not learned in as many steps.
            tie_word_embeddings=True,
            rope_theta=stage.rope_theta,
            max_position_embeddings=stage.length,
            bos_token_id=None,
            eos_token_ids=(),
            dtype="float32",
        )
