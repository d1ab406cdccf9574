"""`qwen-jax data score` and `qwen-jax data distil`: scores of documents by models, and students of them."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from qwen_jax.cli.common import Count, DType, ModelOption, Seed, Texts, model_name, sibling
from qwen_jax.errors import InputError

if TYPE_CHECKING:
    from qwen_jax.config import ModelConfig

Inputs = Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN|FILE")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreDocuments:
    """Score documents with a model, without generation: ratings on rubrics, topics and formats, rewards, or a student.

    An instruct model rates each document from 1 to 5 on each rubric: the score is the mean rating under the
    probabilities that it gives to the digits. A reward model gives its reward, and a student (qwen-jax data distil) the
    scores that it has learned. Of long documents the middle is left out.

    The output has a Parquet file for each shard of documents, with a row for each document: id, shard, row, and the
    scores. A job that was interrupted goes on when the same command is given again; finished shards are kept.

    Args:
        model: Checkpoint folder of an instruct model, a reward model or a student, or Hub id.
        input: The folder of a finished curation: the documents that its stages have kept, with their final text. Or
            files, folders and patterns of JSONL, Parquet or text.
        output: Folder for the scores.
        rubric: education, clarity, reasoning, cleanliness, code, mathematics, topic, format; by default the first six.
        field: JSON field or Parquet column with the text of files.
        sample: Share of the documents that are scored, such as 0.01 to train a student; others have nulls.
        max_tokens: Tokens that are read of a document.
        row_tokens: Length of the packed rows; by default 8,192, on a CPU 1,024, or more for long documents.
        batch_tokens: Tokens that run together; by default 32,768, on a CPU 4,096.
        dtype: To compute in; by default bfloat16, on a CPU float32.
        mesh: Devices to spread over, such as data=4,tensor=2.
        distributed: First join the other processes of a SLURM, GKE, MPI or TPU job.
        coordinator: HOST:PORT of process 0, if no scheduler says it.
        num_processes: How many, if no scheduler says it.
        process_id: Of this process, if no scheduler says it.
        json: Print the summary as one JSON object.
    """

    model: ModelOption = None
    input: Inputs
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    rubric: Annotated[Texts, tyro.conf.arg(metavar="NAME")] = ()
    field: str = "text"
    sample: float = 1.0
    max_tokens: Annotated[int, tyro.conf.arg(metavar="N")] = 2048
    row_tokens: Count = None
    batch_tokens: Count = None
    dtype: DType | None = None
    mesh: Annotated[str, tyro.conf.arg(metavar="AXIS=N,...")] = ""
    distributed: bool = False
    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    num_processes: Count = None
    process_id: Count = None
    json: bool = False

    def run(self) -> int:
        name = model_name(None, self.model)
        if self.distributed or self.coordinator:
            sibling("train.distributed").join(self.coordinator, self.num_processes, self.process_id)
        import jax

        from qwen_jax.cli.formats import CheckpointFormats
        from qwen_jax.parallel.multihost import check_uses_all
        from qwen_jax.parallel.sharding import make_mesh, parse_mesh

        # Everything that can be wrong is checked before the weights are loaded.
        shards = sibling("train.curate.scoring.shards").find_shards(self.input, self.field)
        mesh = make_mesh(parse_mesh(self.mesh))
        check_uses_all(mesh, "data")
        questions, scorers = sibling("train.curate.scoring.questions"), sibling("train.curate.scoring.scorers")
        options = sibling("train.curate.scoring.model").ScoringOptions(
            self.max_tokens, self.row_tokens, self.batch_tokens, self.dtype
        )
        asked: tuple[str, ...] = self.rubric
        if not asked and not sibling("train.curate.scoring.student").is_student(Path(name)):
            rewards = _config(name).score is not None
            asked = ("reward",) if rewards else tuple(rubric.name for rubric in questions.RUBRICS)
        built_in = questions.questions_of(asked) if asked else ()
        scorer = scorers.open_scorer(name, built_in, CheckpointFormats(), mesh, options)
        score_corpus = sibling("train.curate.scoring.job").score_corpus
        summary = score_corpus(scorer, shards, self.output, field=self.field, sample=self.sample)
        if jax.process_index() > 0:
            return 0
        if self.json:
            print(json.dumps({"output": str(self.output), **summary}))
            return 0
        skipped = summary["shards_skipped"]
        print(
            f"{summary['documents']:,} documents scored ({summary['empty']:,} without text, {summary['cut']:,} cut, "
            f"{summary['bad_records']:,} bad records) in {summary['seconds']:.0f} s: "
            f"{summary['documents_per_second']:,.1f} documents/s, {summary['tokens_per_second']:,.0f} tokens/s, "
            f"{summary['padding_share']:.1%} padding; {summary['shards']} shards in {self.output}"
            + (f", {skipped} of them before" if skipped else "")
        )
        if summary["answer_mass"] < _LITTLE:
            print(
                f"warning: the answers that were offered have {summary['answer_mass']:.1%} of the model's probability. "
                "It may be a base model; give an instruct model."
            )
        return 0


# Probability of the offered answers below which a model does not seem to answer.
_LITTLE = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distil:
    """Train a small student on the scores of a model, and validate it on documents that it was not trained on.

    First score a sample: qwen-jax data score --sample 0.01. Then score all documents with the student:
    qwen-jax data score --model STUDENT.

    Args:
        input: The input of the scores: the folder of a curation, or files.
        scores: Folder of `qwen-jax data score`.
        output: Folder for the student.
        column: Scores to learn; by default all.
        field: JSON field or Parquet column with the text of files.
        epochs: Passes over the sample.
        seed: Of weights and order.
        json: Print the validation as one JSON object.
    """

    input: Inputs
    scores: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    column: Annotated[Texts, tyro.conf.arg(metavar="NAME")] = ()
    field: str = "text"
    epochs: int = 20
    seed: Seed = 0
    json: bool = False

    def run(self) -> int:
        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            raise InputError(f"{self.output} exists already. Give a new folder (--output), or remove it.")
        student = sibling("train.curate.scoring.student")
        shards = sibling("train.curate.scoring.shards").find_shards(self.input, self.field)
        config = student.StudentConfig(epochs=self.epochs, seed=self.seed)
        distil = sibling("train.curate.scoring.distil").distil
        trained = distil(shards, self.scores, config, columns=self.column, field=self.field)
        try:
            trained.save(self.output)
        except OSError as error:
            raise InputError(f"Cannot write {self.output}: {error.strerror}. Give another folder.") from None
        found = trained.validation
        if self.json:
            print(json.dumps({"output": str(self.output), **found}))
            return 0
        listed = ", ".join(f"{name} {value:.3f}" for name, value in found["spearman"].items())
        print(
            f"trained on {found['trained']:,} documents in {found['seconds']:.0f} s; rank correlation with the teacher "
            f"on {found['held_out']:,} others: {listed or 'none'}; student in {self.output}"
        )
        return 0


def _config(name: str) -> "ModelConfig":
    from qwen_jax.config import load_config
    from qwen_jax.hub import CONFIG, resolve

    return load_config(resolve(name, CONFIG))
