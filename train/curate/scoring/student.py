"""A small student of a large scorer: a bag of hashed words and word pairs, an embedding, and one hidden layer.

It learns the scores that a model has given to a sample of documents, and then scores all of them on a CPU. The features
and the mean of their vectors are those of fastText (Joulin et al. 2016, arXiv:1607.01759).
"""

import dataclasses
import functools
import re
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qwen_jax.errors import InputError
from qwen_jax.files import read_json, to_json, why_unusable
from train.curate.scoring.ranks import spearman
from train.fields import at_least
from train.files import write_file

WEIGHTS, DESCRIPTION = "student.safetensors", "student.json"
_FORMAT = 1
_WORD = re.compile(r"\w+|[^\w\s]")
# Documents that are computed together: one shape for all.
_BATCH = 256

Weights = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """A student and how it is trained.

    Attributes:
      buckets: rows of the embedding, which features are hashed into.
      width: of a feature's vector.
      hidden: width of the hidden layer.
      words: of a document that are read; of a longer one, as many from its beginning as from its end.
      epochs: passes over the sample.
      learning_rate: of AdamW at the first step; it then falls to 0 as a cosine.
      weight_decay: of AdamW.
      drop: share of the features that are left out in training, drawn again in each step.
      held_out: share of the sample that is kept out of training, for validation.
      seed: of weights, order and dropout.

    Raises:
      InputError: a value out of range.
    """

    buckets: int = 1 << 16
    width: int = 32
    hidden: int = 64
    words: int = 512
    epochs: int = 20
    learning_rate: float = 5e-3
    weight_decay: float = 1e-2
    drop: float = 0.2
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, buckets=2, width=1, hidden=1, words=2, epochs=1)
        for name in ("drop", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be from 0 to below 1, got {getattr(self, name)}.")
        if not self.learning_rate > 0 or not self.weight_decay >= 0:
            raise InputError("learning_rate must be above 0, and weight_decay at least 0.")


@dataclasses.dataclass(frozen=True)
class Student:
    """A trained student.

    Attributes:
      config: its sizes.
      columns: the scores that it gives.
      weights: arrays.
      validation: how well it was found to agree with its teacher; see `train_student`.
      teacher: the settings that the scores came from, for the record.
    """

    config: StudentConfig
    columns: tuple[str, ...]
    weights: Weights
    validation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    teacher: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def score(self, texts: Sequence[str | None]) -> np.ndarray:
        """Scores documents.

        Returns:
          float32 [documents, columns]; NaN for documents without any text.
        """
        found = np.full((len(texts), len(self.columns)), np.nan, np.float32)
        there = [i for i, text in enumerate(texts) if text is not None and text.strip()]
        weights = jax.device_put(self.weights)
        for start in range(0, len(there), _BATCH):
            some = there[start : start + _BATCH]
            ids_BF = np.zeros((_BATCH, _count(self.config)), np.int32)
            ids_BF[: len(some)] = features([texts[i] or "" for i in some], self.config)
            normal = np.asarray(_forward(weights, ids_BF))[: len(some)]
            found[some] = normal * self.weights["std"] + self.weights["mean"]
        return found

    def save(self, folder: Path) -> None:
        """Writes the student as `student.safetensors` and `student.json`. The description comes last.

        Raises:
          OSError: the folder cannot be written.
        """
        from safetensors.numpy import save

        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / WEIGHTS, save({name: np.asarray(value) for name, value in self.weights.items()}))
        description = {
            "format": _FORMAT,
            "columns": list(self.columns),
            "config": dataclasses.asdict(self.config),
            "validation": dict(self.validation),
            "teacher": dict(self.teacher),
        }
        write_file(folder / DESCRIPTION, (to_json(description, indent=2) + "\n").encode())


def is_student(folder: Path) -> bool:
    """Whether a folder holds a student."""
    return (folder / DESCRIPTION).is_file()


def load_student(folder: Path) -> Student:
    """Reads a student.

    Raises:
      InputError: no student, or a damaged one.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    described, file = read_json(folder / DESCRIPTION), folder / WEIGHTS
    if described.get("format") != _FORMAT:
        raise InputError(f"{folder / DESCRIPTION} has the format {described.get('format')}, expected {_FORMAT}.")
    if problem := why_unusable(file):
        raise InputError(problem)
    try:
        config, columns = StudentConfig(**described["config"]), tuple(map(str, described["columns"]))
        weights = load(file.read_bytes())
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder} holds a damaged student: {error}. Train it again.") from None
    expected = {name: value.shape for name, value in _initial(config, len(columns)).items()}
    found = {name: value.shape for name, value in weights.items()}
    if found != expected or any(value.dtype != np.float32 for value in weights.values()):
        raise InputError(f"{file} holds the arrays {found}, expected {expected} in float32. Train the student again.")
    return Student(config, columns, weights, described.get("validation", {}), described.get("teacher", {}))


def train_student(
    texts: Sequence[str | None],
    scores: Mapping[str, np.ndarray],
    config: StudentConfig = StudentConfig(),
    teacher: Mapping[str, Any] | None = None,
) -> Student:
    """Trains a student on a sample, and validates it on documents that it was not trained on.

    Which documents are held out depends on their text alone, so that copies are never on both sides.

    Args:
      texts: the sample.
      scores: of a teacher, [documents] by column. Documents without text or with a missing score are left out.
      config: the student.
      teacher: settings of the teacher, for the record.

    Returns:
      The student. Its `validation` has `trained` and `held_out`, numbers of documents, `seconds`, and `spearman`: by
      column the rank correlation with the teacher on held-out documents.

    Raises:
      InputError: no scores, scores of another number of documents, fewer than 20 documents, or all scores equal.
    """
    if not scores or any(np.shape(values) != (len(texts),) for values in scores.values()):
        sizes = {name: np.shape(values) for name, values in scores.items()}
        raise InputError(f"Expected a score of each of the {len(texts)} documents, got {sizes or 'none'}.")
    begin, columns = time.perf_counter(), tuple(scores)
    target_NC = np.stack([np.asarray(scores[name], np.float32) for name in columns], axis=1)
    usable = [
        i for i, text in enumerate(texts) if text is not None and text.strip() and np.isfinite(target_NC[i]).all()
    ]
    if len(usable) < 20:
        raise InputError(f"{len(usable)} documents have text and all scores, expected at least 20. Label more.")

    # The sample in two parts.
    kept, target_NC = [texts[i] or "" for i in usable], target_NC[usable]
    held = np.array([zlib.crc32(text.encode()) % 10_000 < config.held_out * 10_000 for text in kept])
    mean, std = target_NC[~held].mean(axis=0), target_NC[~held].std(axis=0)
    if flat := [name for name, s in zip(columns, std, strict=True) if not s > 0]:
        raise InputError(f"All scores of {', '.join(flat)} are equal, so that there is nothing to learn.")
    ids_NF = np.concatenate([features(kept[i : i + 1024], config) for i in range(0, len(kept), 1024)])

    # Training, in batches of one shape: the last ones of an epoch are left out.
    trained = np.flatnonzero(~held)
    batch = min(_BATCH // 4, len(trained))
    steps = config.epochs * (len(trained) // batch)
    schedule = optax.cosine_decay_schedule(config.learning_rate, steps)
    optimizer = optax.adamw(schedule, weight_decay=config.weight_decay)
    weights = {name: jnp.asarray(value) for name, value in _initial(config, len(columns)).items()}
    state = optimizer.init(weights)
    normal_NC = (target_NC - mean) / std
    rng, key = np.random.default_rng(config.seed), jax.random.key(config.seed)
    for number, chosen in enumerate(_order(trained, batch, config.epochs, rng)):
        inputs = ids_NF[chosen], normal_NC[chosen], jax.random.fold_in(key, number)
        weights, state = _step(optimizer, config.drop, weights, state, *inputs)
    arrays = {**{name: np.asarray(value) for name, value in weights.items()}, "mean": mean, "std": std}

    # Validation.
    student = Student(config, columns, arrays, {}, dict(teacher or {}))
    agreement: dict[str, float] = {}
    if held.any():
        found = student.score([text for text, out in zip(kept, held, strict=True) if out])
        agreement = {name: spearman(found[:, c], target_NC[held][:, c]) for c, name in enumerate(columns)}
    validation = {
        "trained": len(trained),
        "held_out": int(held.sum()),
        "spearman": agreement,
        "seconds": round(time.perf_counter() - begin, 2),
    }
    return dataclasses.replace(student, validation=validation)


# --- features ------------------------------------------------------------------------------------------------------


def features(texts: Sequence[str], config: StudentConfig) -> np.ndarray:
    """Hashed features int32 [documents, F]: words, pairs of neighbours, and the length; 0 fills up.

    Args:
      texts: of documents.
      config: gives the words of a document that are read, and the buckets.
    """
    ids_NF = np.zeros((len(texts), _count(config)), np.int32)
    for row_F, text in zip(ids_NF, texts, strict=True):
        words = _words(text, config.words)
        hashes = np.array([_hash(word) for word in words], np.uint64)
        pairs = (hashes[:-1] * np.uint64(0x9E3779B97F4A7C15) + hashes[1:]) >> np.uint64(17)
        length = np.array([_hash(f"length {len(text).bit_length()}")], np.uint64)
        found = np.concatenate([length, hashes, pairs]) % np.uint64(config.buckets - 1) + np.uint64(1)
        row_F[: len(found)] = found
    return ids_NF


def _count(config: StudentConfig) -> int:
    return 2 * config.words


def _words(text: str, most: int) -> list[str]:
    # Of a huge document, only so much is split that it surely has enough words.
    side = 32 * most
    parts = [text] if len(text) <= 2 * side else [text[:side], text[-side:]]
    words = [word for part in parts for word in _WORD.findall(part.lower())]
    return words if len(words) <= most else [*words[: most - most // 2], *words[-(most // 2) :]]


@functools.lru_cache(maxsize=1 << 17)
def _hash(word: str) -> int:
    return zlib.crc32(word.encode("utf-8", "surrogatepass"))


# --- the model -----------------------------------------------------------------------------------------------------


def _initial(config: StudentConfig, columns: int) -> dict[str, np.ndarray]:
    rng, F, H = np.random.default_rng(config.seed), config.width, config.hidden

    def normal(*shape: int, scale: float) -> np.ndarray:
        return rng.normal(0, scale, shape).astype(np.float32)

    zeros = functools.partial(np.zeros, dtype=np.float32)
    return {
        "embedding": normal(config.buckets, F, scale=0.3),
        "hidden": normal(F, H, scale=F**-0.5),
        "hidden_bias": zeros(H),
        "output": normal(H, columns, scale=H**-0.5),
        "output_bias": zeros(columns),
        "mean": zeros(columns),
        "std": zeros(columns),
    }


def _forward_kept(weights: Weights, ids_BF: jax.Array, kept_BF: jax.Array) -> jax.Array:
    """Normalised scores [B, C] from the features that are kept."""
    weight_BF = kept_BF.astype(jnp.float32)
    x_BD = jnp.einsum("BFD,BF->BD", weights["embedding"][ids_BF], weight_BF)
    x_BD = x_BD / jnp.maximum(weight_BF.sum(axis=1), 1.0)[:, None] ** 0.5
    h_BH = jax.nn.relu(x_BD @ weights["hidden"] + weights["hidden_bias"])
    return h_BH @ weights["output"] + weights["output_bias"]


@jax.jit
def _forward(weights: Weights, ids_BF: jax.Array) -> jax.Array:
    return _forward_kept(weights, ids_BF, ids_BF > 0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(
    optimizer: optax.GradientTransformation,
    drop: float,
    weights: Weights,
    state: Any,
    ids_BF: jax.Array,
    target_BC: jax.Array,
    key: jax.Array,
) -> tuple[Weights, Any]:
    def loss(weights: Weights) -> jax.Array:
        kept_BF = (ids_BF > 0) & (jax.random.uniform(key, ids_BF.shape) >= drop)
        return jnp.square(_forward_kept(weights, ids_BF, kept_BF) - target_BC).mean()

    updates, state = optimizer.update(jax.grad(loss)(weights), state, weights)
    return optax.apply_updates(weights, updates), state


def _order(items: np.ndarray, batch: int, epochs: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    for _ in range(epochs):
        shuffled = rng.permutation(items)
        for start in range(0, len(items) - batch + 1, batch):
            yield shuffled[start : start + batch]
