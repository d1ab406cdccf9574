"""Scorers as operators of a curation: batch in, columns out."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from qwen_jax.errors import InputError
from qwen_jax.parallel.sharding import make_mesh, parse_mesh
from train.curate.operator import Compute, Operator
from train.curate.scoring.model import ScoringOptions
from train.curate.scoring.questions import Question, check_questions, to_json
from train.curate.scoring.scorers import VERSION, ModelScorer, Scorer, StudentScorer, schema_of
from train.curate.scoring.student import DESCRIPTION, WEIGHTS, load_student
from train.tuned import Formats


@dataclasses.dataclass(frozen=True)
class ModelScores(Operator):
    """Scores by an instruct model that is asked questions, or by a reward model.

    One process holds the model on its devices: run one for each host. A model that needs several hosts is run by
    `qwen-jax data score`.

    Attributes:
      model: checkpoint folder, or Hub id.
      questions: what is asked.
      formats: reads the model, such as `qwen_jax.cli.formats.CheckpointFormats()`; it can be pickled.
      mesh: devices to spread over, such as "tensor=2".
      options: how documents are read.
    """

    model: str
    questions: tuple[Question, ...]
    formats: Formats = dataclasses.field(repr=False, compare=False)
    mesh: str = ""
    options: ScoringOptions = ScoringOptions()

    def __post_init__(self) -> None:
        check_questions(self.questions)

    @property
    def makes(self) -> pa.Schema:
        """The columns of `schema_of`."""
        return schema_of(self.questions)

    def start(self) -> Compute:
        """See `Operator.start`."""
        mesh = make_mesh(parse_mesh(self.mesh))
        return _compute(ModelScorer(self.model, self.questions, self.formats, mesh, self.options))

    def settings(self) -> Mapping[str, Any]:
        """Name, version, questions and options, and a hash of the model's files in place of its name."""
        return {
            "name": self.name,
            "version": [self.version, VERSION],
            "model": self.formats.fingerprint(self.model),
            "questions": [to_json(question) for question in self.questions],
            "options": dataclasses.asdict(self.options),
            "mesh": self.mesh,
        }


@dataclasses.dataclass(frozen=True)
class StudentScores(Operator):
    """Scores by a student that was distilled from a larger scorer.

    Attributes:
      folder: as `Student.save` writes it.
    """

    folder: str
    version: ClassVar[int] = 1

    @property
    def makes(self) -> pa.Schema:
        """The student's columns, float32."""
        return pa.schema([pa.field(name, pa.float32()) for name in load_student(Path(self.folder)).columns])

    def start(self) -> Compute:
        """See `Operator.start`."""
        return _compute(StudentScorer(Path(self.folder)))

    def settings(self) -> Mapping[str, Any]:
        """Name, version, and a hash of the student's files in place of its folder."""
        whole = hashlib.sha256()
        for name in (DESCRIPTION, WEIGHTS):
            file = Path(self.folder) / name
            if not file.is_file():
                raise InputError(f"{self.folder} holds no student: expected {DESCRIPTION} and {WEIGHTS} in it.")
            whole.update(file.read_bytes())
        return {"name": self.name, "version": [self.version, VERSION], "student": whole.hexdigest()}


def _compute(scorer: Scorer) -> Compute:
    def compute(table: pa.Table) -> pa.Table:
        return scorer.score(table["text"].to_pylist())[0]

    return compute
