"""A small tokenizer, and the folder that it is saved in."""

from pathlib import Path

import numpy as np
import pytest

from qwen_jax.tokenizer import Tokenizer, train_bpe
from tests.helpers.data_sets import random_texts


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(random_texts(np.random.default_rng(0), 50), 320)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(path)
    return path
