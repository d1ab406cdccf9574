"""Tiny models that rate documents, and documents for them."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.tokenizer import Tokenizer, train_bpe
from tests.helpers.hf import make_hf_checkpoint
from tests.helpers.reward import make_reward_checkpoint
from train.curate.scoring import prompt
from train.curate.scoring.model import ScoringOptions
from train.curate.scoring.questions import Choice, Rating, Reward

RATINGS = (Rating("good", "Good?"), Rating("clear", "How clear, not how long?", 0, 7))
TOPIC = Choice("topic", "Topic?", (("code", "code"), ("news", "news"), ("other", "other")))
WORDS = "stone river the of light data model green city walk quiet number".split()
OPTIONS = ScoringOptions(max_tokens=64, row_tokens=256, batch_tokens=256, dtype="float32")
VOCAB = 640


def tokenizer() -> Tokenizer:
    """Has merges for the words of documents and of the prompt."""
    asked = [question.text for question in (*RATINGS, TOPIC)] + [Reward().request]
    texts = [prompt._SYSTEM, prompt._OPENING, prompt._CLOSING, prompt._GAP, "user\nassistant\nsystem\n", *asked]
    return train_bpe([" ".join(WORDS), *texts] * 3, VOCAB)


def documents(rng: np.random.Generator, count: int, longest: int = 120) -> list[str]:
    """Texts of random words, some longer than the budget of `OPTIONS`."""
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest))) for _ in range(count)]


def make_instruct(folder: Path, seed: int = 0, tie: bool = True) -> Any:
    """Writes an instruct model with random weights; gives that of transformers back."""
    made = tokenizer()
    model = make_hf_checkpoint(folder, tie=tie, vocab_size=VOCAB, seed=seed, max_position_embeddings=1024)
    made.save(folder)
    return model


def make_reward(folder: Path, seed: int = 0) -> Any:
    """Writes a reward model with random weights and the same tokenizer."""
    model = make_reward_checkpoint(folder, "linear", vocab_size=VOCAB, seed=seed, max_position_embeddings=1024)
    tokenizer().save(folder)
    return model


def options(**changes: Any) -> ScoringOptions:
    """`OPTIONS` with changes."""
    return dataclasses.replace(OPTIONS, **changes)
