"""Another objective, regression on hidden states, needs no change elsewhere: step, loop and launcher serve it."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.config import ModelConfig
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.published import published
from qwen_jax.tokenizer import Tokenizer, train_bpe
from tests.helpers.runs import assert_same_weights, stop_after
from train.data.batch import Batch, place
from train.data.packing import pack
from train.launch import Job, Phase, launch
from train.loop import CheckpointConfig, LoopConfig, Monitor, fit
from train.objective import BatchContext, BoundModel, Maximum, Objective, Sums, join_statistics
from train.optimizer import OptimizerConfig, Schedule
from train.state import TrainState, init_state
from train.step import EvalStep, StepConfig, make_eval_step, make_train_step

MODEL = dataclasses.replace(published("tiny"), vocab_size=64, hidden_size=32, intermediate_size=64, head_dim=8)
OPTIMIZER = OptimizerConfig(Schedule(12, 2e-3, warmup_steps=2))
STEP = StepConfig(dtype="float32")
ROWS, LENGTH = 8, 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScoredRows:
    """Packed rows, and a score of each token [batch, length]."""

    rows: Batch
    scores: np.ndarray


@dataclasses.dataclass(frozen=True)
class Regression(Objective[ScoredRows, dict[str, jax.Array], None]):
    """Squared error of a linear readout of the final hidden states."""

    model: ModelConfig
    scale: float = 1.0

    def denominator(self, batch: ScoredRows) -> jax.Array:
        return (batch.rows.segment_ids > 0).sum(dtype=jnp.float32)

    def sums(
        self, model: BoundModel, batch: ScoredRows, context: BatchContext[dict[str, jax.Array], None] | None
    ) -> tuple[Sums, dict[str, jax.Array]]:
        hidden_BTD, _ = model.hidden(batch.rows)
        scores, weights = map(model.in_model_order, (batch.scores, (batch.rows.segment_ids > 0).astype(jnp.float32)))
        readout_D = jnp.cos(jnp.arange(self.model.hidden_size, dtype=jnp.float32)) * self.scale
        error = (jnp.einsum("BTD,D->BT", hidden_BTD.astype(jnp.float32), readout_D) - scores) * weights
        loss = jnp.square(error).sum()
        sums = Sums(loss, weights.sum(), jax.lax.stop_gradient(loss))
        return sums, {"absolute_error": jnp.abs(error).sum()}

    def zero_statistics(self) -> dict[str, jax.Array]:
        return {"absolute_error": jnp.zeros((), jnp.float32)}

    def explain(self, numbers: Mapping[str, float]) -> str:
        return f"The mean absolute error is {numbers['absolute_error']}."


@functools.cache
def batch(step: int) -> ScoredRows:
    """Documents of unequal numbers in each row, so that a mean of means would be wrong; a token's score is its sine."""
    rng = np.random.default_rng(step)
    rows = pack([rng.integers(0, 64, n) for n in rng.integers(2, 2 * LENGTH, 40)], LENGTH)
    rows = jax.tree.map(lambda x: x[:ROWS], rows)
    empty = np.arange(ROWS) % 3 == 0  # Rows of different weight: half of a row is padding.
    rows = dataclasses.replace(
        rows, segment_ids=np.where(empty[:, None] & (np.arange(LENGTH) > 7), 0, rows.segment_ids)
    )
    return ScoredRows(rows, np.sin(rows.tokens).astype(np.float32))


class Data:
    """Batches that may depend on the state; it notes the steps of the states that it is given."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def batch(self, step: int, state: TrainState) -> ScoredRows:
        self.seen.append(int(state.step))
        return batch(step)


class Log:
    """Keeps the records."""

    def __init__(self) -> None:
        self.records: list[Mapping[str, float]] = []

    def write(self, record: Mapping[str, float]) -> None:
        self.records.append(record)

    def flush(self) -> None: ...

    def close(self) -> None: ...


def trained(axes: dict[str, int], accumulation: int, steps: int = 4) -> tuple[list[float], list[float], list[float]]:
    """Loss, gradient norm and absolute error of each step."""
    mesh, log, data = make_mesh(axes), Log(), Data()
    config = dataclasses.replace(STEP, accumulation=accumulation)
    with jax.set_mesh(mesh):
        step = make_train_step(Regression(MODEL), OPTIMIZER, config, mesh)
        fit(steps, init_state(MODEL, OPTIMIZER, 0, mesh), step, data, mesh=mesh, monitor=Monitor(log=log))
    assert data.seen == list(range(steps))
    return tuple([r[name] for r in log.records] for name in ("loss", "grad_norm", "absolute_error"))  # type: ignore[return-value]


@functools.cache
def one_device() -> tuple[list[float], list[float], list[float]]:
    return trained({}, 1)


def test_the_first_loss_is_the_formula() -> None:
    mesh = make_mesh({})
    with jax.set_mesh(mesh):
        state = init_state(MODEL, OPTIMIZER, 0, mesh)
        sums, _ = make_eval_step(Regression(MODEL), STEP, mesh)(state.params, place(batch(0), mesh))
    tokens = (batch(0).rows.segment_ids > 0).sum()
    assert float(sums.weight) == tokens
    np.testing.assert_allclose(one_device()[0][0], float(sums.loss) / tokens, rtol=1e-5)
    assert one_device()[0][-1] < one_device()[0][0]


@pytest.mark.parametrize(
    ("axes", "accumulation"),
    [({}, 4), ({"data": 2, "fsdp": 2}, 2), ({"fsdp": 2, "tensor": 2}, 1), ({"context": 2}, 2)],
    ids=str,
)
def test_loss_and_gradient_depend_neither_on_accumulation_nor_on_the_mesh(
    axes: dict[str, int], accumulation: int
) -> None:
    # float32 sums in another order.
    np.testing.assert_allclose(trained(axes, accumulation), one_device(), rtol=1e-3)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["some text of no importance " * 9], 300)


class Silent:
    """A report that keeps records and shows nothing."""

    def __init__(self) -> None:
        self.log = Log()

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *_: object) -> None: ...

    def monitor(self, index: int) -> Monitor:
        return Monitor(log=self.log)

    def end(self, step: int, stopped_by: int, saved: int | None) -> None: ...


def job(folder: Path, tokenizer: Tokenizer, report: Silent) -> Job[ScoredRows]:
    """Two phases, the second with another objective and on another mesh."""

    def evaluate(state: TrainState, eval_step: EvalStep[ScoredRows]) -> dict[str, float]:
        sums, _ = eval_step(state.params, place(batch(99), state.step.sharding.mesh))  # type: ignore[attr-defined]
        return {"loss": float(sums.loss) / float(sums.weight)}

    meshes = make_mesh({}, jax.devices()[:1]), make_mesh({"fsdp": 2})
    phases = tuple(
        Phase(end, Regression(MODEL, scale), STEP, mesh, lambda step: Data(), evaluate)
        for end, scale, mesh in ((4, 1.0, meshes[0]), (8, 0.5, meshes[1]))
    )
    return Job(
        folder, MODEL, tokenizer, OPTIMIZER, phases, lambda step: report, loop=LoopConfig(evaluate_every=4),
        checkpoints=CheckpointConfig(every=2),
    )  # fmt: skip


def test_the_launcher_takes_it_to_its_end_and_resumes_it(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, first, second = Silent(), Silent(), Silent()
    outcome = launch(job(tmp_path / "straight" / "checkpoints", tokenizer, straight))
    assert (outcome.step, outcome.signal, outcome.steps_taken) == (8, 0, 8)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        outcome = launch(job(tmp_path / "run" / "checkpoints", tokenizer, first))
    assert outcome.step == 5
    assert outcome.signal
    outcome = launch(job(tmp_path / "run" / "checkpoints", tokenizer, second))
    assert (outcome.step, outcome.steps_taken) == (8, 3)

    def numbers(*reports: Silent) -> list[tuple[float | None, ...]]:
        names = "step", "loss", "grad_norm", "held_out_loss"
        records = [record for report in reports for record in report.log.records]
        return [tuple(record.get(name) for name in names) for record in records]

    assert numbers(first, second) == numbers(straight)
    assert [r["step"] for r in straight.log.records if "held_out_loss" in r] == [0, 4, 8]
    assert_same_weights(tmp_path / "run", tmp_path / "straight", step=8)


def test_statistics_of_parts_add_up_and_the_largest_is_kept() -> None:
    parts = [{"sum": np.float64(x), "largest": Maximum(np.float64(x))} for x in (2.0, 5.0, 3.0)]
    joined = join_statistics(*parts)
    assert (joined["sum"], float(joined["largest"].value)) == (10.0, 5.0)
    assert np.isnan(
        join_statistics(*parts, {"sum": np.float64(0), "largest": Maximum(np.float64("nan"))})["largest"].value
    )
