"""Scorers: documents in, columns out. A model that is asked questions, or a student."""

import abc
import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from qwen_jax.errors import InputError
from qwen_jax.files import read_json
from qwen_jax.inference.prompts import check_generates
from qwen_jax.inference.scorer import check_scores
from qwen_jax.parallel.sharding import Sharding
from train.curate.scoring.model import Answers, DocumentReader, ScoringOptions, Work
from train.curate.scoring.prompt import Prompt
from train.curate.scoring.questions import Choice, Question, Rating, Reward, check_questions, columns_of, to_json
from train.curate.scoring.student import DESCRIPTION, WEIGHTS, is_student, load_student
from train.tuned import Formats

DECIMALS = 3
"""Of scores and probabilities. Rounding hides most of the differences that other documents in a batch make."""

VERSION = 1
"""Increases when the same settings give other scores."""


class Scorer(abc.ABC):
    """Makes columns of texts. A document's scores depend on its text alone, up to rounding.

    Attributes:
      schema: the columns.
      settings: what decides the scores, as JSON values.
    """

    schema: pa.Schema
    settings: Mapping[str, Any]

    @abc.abstractmethod
    def score(self, texts: Sequence[str | None]) -> tuple[pa.Table, Work]:
        """The columns of some documents, null for those without text, and what was done.

        Args:
          texts: of documents.

        Raises:
          NotFiniteError: a score that is not finite.
        """


class ModelScorer(Scorer):
    """An instruct model or a reward model that is asked questions."""

    def __init__(
        self,
        model: str,
        questions: Sequence[Question],
        formats: Formats,
        mesh: Mesh,
        options: ScoringOptions = ScoringOptions(),
    ):
        """
        Args:
          model: checkpoint folder, or Hub id.
          questions: what is asked.
          formats: reads the model; the command line gives that of `convert`.
          mesh: that the model is put on, from `make_mesh`.
          options: how documents are read.

        Raises:
          InputError: a model that cannot answer the questions; found before the weights are loaded.
        """
        questions = check_questions(questions)
        config, tokenizer, folder = formats.describe(model)
        (check_scores if isinstance(questions[0], Reward) else check_generates)(config)
        _check_has_head(folder)
        Prompt(tokenizer, questions, options.max_tokens)
        Sharding.for_inference(config, mesh)
        dtype = options.compute_dtype()
        options = dataclasses.replace(options, dtype=dtype)
        params = formats.load(model, config, mesh, dtype, stacked=False)
        self.reader = DocumentReader(config, params, mesh, tokenizer, questions, options)
        self.schema = schema_of(questions)
        # The mesh and the shape of batches change scores by rounding alone, and are left out.
        self.settings = {
            "version": VERSION,
            "model": formats.fingerprint(model),
            "questions": [to_json(question) for question in questions],
            "max_tokens": options.max_tokens,
            "dtype": dtype,
            "decimals": DECIMALS,
        }

    def score(self, texts: Sequence[str | None]) -> tuple[pa.Table, Work]:
        """See `Scorer.score`."""
        answers = self.reader.read(texts)
        return table_of(self.reader.questions, answers), answers.work


class StudentScorer(Scorer):
    """A student in a folder."""

    def __init__(self, folder: Path):
        """
        Args:
          folder: as `Student.save` writes it.

        Raises:
          InputError: no student, or a damaged one.
        """
        self.student = load_student(folder)
        self.schema = pa.schema([pa.field(name, pa.float32()) for name in self.student.columns])
        self.settings = {
            "version": VERSION,
            "student": [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (DESCRIPTION, WEIGHTS)],
            "decimals": DECIMALS,
        }

    def score(self, texts: Sequence[str | None]) -> tuple[pa.Table, Work]:
        """See `Scorer.score`."""
        begin = time.perf_counter()
        found_NC = self.student.score(texts)
        empty = int(np.isnan(found_NC).all(axis=1).sum())
        work = Work(len(texts) - empty, empty, mass=len(texts) - empty, seconds=time.perf_counter() - begin)
        return pa.Table.from_arrays([_floats(column) for column in found_NC.T], schema=self.schema), work


def schema_of(questions: Sequence[Question]) -> pa.Schema:
    """The columns that the answers to questions make: float32 scores; of a choice the class and its probability."""
    fields = []
    for question in questions:
        names = columns_of(question)
        kinds = (pa.string(), pa.float32()) if isinstance(question, Choice) else (pa.float32(),)
        fields += [pa.field(name, kind) for name, kind in zip(names, kinds, strict=True)]
    return pa.schema(fields)


def table_of(questions: Sequence[Question], answers: Answers) -> pa.Table:
    """The columns of `schema_of`, rounded to `DECIMALS`; null for empty documents."""
    columns: list[pa.Array] = []
    for question, values in zip(questions, answers.values, strict=True):
        if isinstance(question, Reward):
            columns.append(_floats(values[:, 0]))
            continue
        share = probabilities(values)
        if isinstance(question, Rating):
            columns.append(_floats(share @ np.arange(question.lowest, question.highest + 1)))
            continue
        there = np.isfinite(share).all(axis=1)
        best = np.where(there, share.argmax(axis=1), 0)
        names = [question.classes[i][0] if known else None for i, known in zip(best, there, strict=True)]
        columns += [pa.array(names, pa.string()), _floats(share[np.arange(len(best)), best])]
    return pa.Table.from_arrays(columns, schema=schema_of(questions))


def probabilities(logprobs_NA: np.ndarray) -> np.ndarray:
    """Float64 [documents, answers]: the probability of each answer among the answers; NaN for empty documents."""
    x_NA = logprobs_NA.astype(np.float64)
    exp_NA = np.exp(x_NA - x_NA.max(axis=1, keepdims=True, initial=-np.inf))
    result: np.ndarray = exp_NA / exp_NA.sum(axis=1, keepdims=True)
    return result


def open_scorer(
    model: str,
    questions: Sequence[Question],
    formats: Formats,
    mesh: Mesh,
    options: ScoringOptions = ScoringOptions(),
) -> Scorer:
    """The scorer of a checkpoint, or of a student, which knows its own columns.

    Args:
      model: folder of a student, checkpoint folder, or Hub id.
      questions: for a checkpoint; none for a student.
      formats, mesh, options: as for `ModelScorer`.

    Raises:
      InputError: questions to a student, or as `ModelScorer` and `load_student`.
    """
    if not is_student(Path(model)):
        return ModelScorer(model, questions, formats, mesh, options)
    if questions:
        raise InputError(f"{model} is a student, which gives the scores that it has learned. Leave the rubrics out.")
    return StudentScorer(Path(model))


def _check_has_head(folder: Path) -> None:
    """Refuses a model that is stored without any head: its embedding would be taken for one."""
    described = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    architectures = described.get("architectures") or []
    if architectures and all(str(name).endswith("Model") and "Reward" not in str(name) for name in architectures):
        raise InputError(
            f"{folder} is an embedding model ({', '.join(map(str, architectures))}), which answers no questions. Give "
            "an instruct model, such as Qwen2.5-0.5B-Instruct."
        )


def _floats(values: np.ndarray) -> pa.Array:
    """Rounded float32, null for NaN."""
    rounded = np.round(values.astype(np.float64), DECIMALS).astype(np.float32)
    return pa.array(rounded + np.float32(0), pa.float32(), mask=np.isnan(rounded))
