"""Distils a scorer: reads what it has given to a sample of documents, and trains a student on it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qwen_jax.errors import InputError
from qwen_jax.files import read_json
from train.curate.scoring.job import SETTINGS
from train.curate.scoring.shards import Shard, chunks
from train.curate.scoring.student import Student, StudentConfig, train_student
from train.fields import differences

_KEYS = ("id", "shard", "row")


def distil(
    shards: Sequence[Shard],
    scores: Path,
    config: StudentConfig = StudentConfig(),
    *,
    columns: Sequence[str] = (),
    field: str = "text",
) -> Student:
    """Trains a student on the scores of a corpus, or of a sample of it.

    Args:
      shards: of the corpus, from `find_shards`.
      scores: folder that `score_corpus` has written for these shards.
      config: the student.
      columns: the scores that it learns; by default all numbers but probabilities of classes.
      field: of the text, in input files.

    Returns:
      The student with its `validation`; see `train_student`.

    Raises:
      InputError: scores of other documents, no such column, or too few documents with scores.
    """
    settings = read_json(scores / SETTINGS)
    now = {"shards": [shard.to_json() for shard in shards]}
    changed = differences({"shards": settings.get("shards", [])}, now)
    if changed:
        name, (before, after) = next(iter(changed.items()))
        raise InputError(
            f"{scores} holds scores of other documents than the input: {name} was {before!r}, is {after!r}. "
            "Give the input that was scored, or score this one."
        )
    texts: list[str] = []
    found: dict[str, list[np.ndarray]] = {}
    for shard in shards:
        table = _table(scores / shard.name)
        names = tuple(columns) or _numbers(table.schema)
        scored = [f.name for f in table.schema if pa.types.is_floating(f.type) and f.name not in _KEYS]
        if missing := [name for name in names if name not in scored]:
            raise InputError(f"{scores} has no score {', '.join(missing)}. Expected some of {', '.join(scored)}.")
        if not names:
            raise InputError(
                f"{scores} has classes alone, and a student learns numbers. Score with a rubric of ratings, or name "
                f"columns of {', '.join(scored)}."
            )
        row, ids = 0, table["id"].to_pylist()
        values_NC = np.stack([table[name].to_numpy().astype(np.float32) for name in names], axis=1)
        for chunk in chunks(shard, field):
            end = row + len(chunk.ids)
            if ids[row:end] != chunk.ids:
                raise InputError(
                    f"{scores / shard.name} holds scores of other documents than the input, from row {row} on. Give "
                    "the input that was scored."
                )
            known = np.isfinite(values_NC[row:end]).all(axis=1)
            texts += [text or "" for text, is_known in zip(chunk.texts, known, strict=True) if is_known]
            for c, name in enumerate(names):
                found.setdefault(name, []).append(values_NC[row:end, c][known])
            row = end
        if row != len(ids):
            raise InputError(f"{scores / shard.name} has {len(ids)} rows, and the input {row}. Give the scored input.")
    labels = {name: np.concatenate(parts) for name, parts in found.items()}
    return train_student(texts, labels, config, settings.get("scores", {}))


def _table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path} cannot be read: {str(error).splitlines()[0]}. Score the whole input first: qwen-jax data score."
        ) from None


def _numbers(schema: pa.Schema) -> tuple[str, ...]:
    classes = [field.name for field in schema if pa.types.is_string(field.type)]
    return tuple(
        field.name
        for field in schema
        if pa.types.is_floating(field.type)
        and field.name not in _KEYS
        and field.name.removesuffix("_probability") not in classes
    )
