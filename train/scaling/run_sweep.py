"""Runs a sweep on this machine, or writes its runs for a scheduler; one table of results."""

import dataclasses
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from qwen_jax.files import read_json, to_json
from qwen_jax.tokenizer import load_tokenizer
from train.config import CAME_LATER, RunConfig
from train.fields import as_json, differences
from train.files import write_file
from train.inputs import data_fingerprint
from train.scaling.run_config import write_run_config
from train.scaling.runs import compute
from train.scaling.sweep import Plan, Run, Sweep, bracketed, make_plan
from train.small_runs import command_line, final_losses, status, write_commands
from train.workers import Workers

RESULTS = "results.parquet"
_RECORD = "sweep.json"
_MISSING = "`qwen-jax scaling` reads and writes Parquet by pyarrow. Install it: pip install 'qwen-jax[data]'."


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The state of a sweep.

    Attributes:
      plan: its runs as far as they are known.
      losses: of the runs that have ended, by name; infinite where a run diverged.
    """

    plan: Plan
    losses: Mapping[str, float]

    @property
    def waiting(self) -> tuple[Run, ...]:
        """The runs that have not ended."""
        return tuple(run for run in self.plan.runs if run.name not in self.losses)

    @property
    def finished(self) -> bool:
        """Nothing is left to run."""
        return self.plan.complete and not self.waiting

    def to_text(self) -> str:
        """The best run of each cell, and what is left."""
        lines = []
        for cell in dict.fromkeys((run.cell.name, run.cell.tokens) for run in self.plan.runs):
            runs = [run for run in self.plan.runs if (run.cell.name, run.cell.tokens) == cell]
            ended = [run for run in runs if run.name in self.losses]
            diverged = sum(math.isinf(self.losses[run.name]) for run in ended)
            text = f"{cell[0]}, {cell[1]:,} tokens: {len(ended)} of {len(runs)} runs have ended, {diverged} diverged"
            good = [run for run in ended if math.isfinite(self.losses[run.name])]
            if good:
                best = min(good, key=lambda run: self.losses[run.name])
                inside = bracketed(best.cell, self.plan.runs, self.losses)
                where = "" if len(ended) < len(runs) else ", bracketed" if inside else ", at the edge of what was run"
                text += (
                    f"; best {self.losses[best.name]:.4f} at learning rate {best.learning_rate:.3g} and batch "
                    f"{best.batch_tokens:,}{where}"
                )
            lines.append(text)
        lines += self.plan.notes
        lines.append(f"{self.plan.flops:.3g} model FLOPs in {len(self.plan.runs)} runs, {len(self.waiting)} not ended")
        return "\n".join(lines)


def run_sweep(
    sweep: Sweep,
    folder: Path,
    train: Callable[[RunConfig], int] | None = None,
    workers: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Trains the runs of a sweep that have not ended. Interrupted, the same call goes on, to the same table.

    Args:
      sweep: what to run.
      folder: takes runs, table and what is compiled.
      train: runs a configuration to its end and returns the signal that stopped it, or 0; by default our trainer, with
        programs that runs of the same shapes share. See `train.workers.Workers`.
      workers: processes that train at the same time on the devices of this machine, which they share. Small runs leave
        a GPU idle between their kernels.
      say: is told of each run that has ended.

    Raises:
      InputError: a sweep over its budget, another sweep in the folder, or a run that cannot be started.
      SystemExit: a signal has stopped a run, which has saved.
    """
    _check_folder(sweep, folder)
    with Workers(folder, workers, train) as pool:
        while _run_round(sweep, folder, pool, say):
            pass
    return collect(sweep, folder)


def _run_round(sweep: Sweep, folder: Path, pool: Workers, say: Callable[[str], None]) -> bool:
    """Trains the runs that are known and have not ended. Returns whether there were any."""
    outcome = collect(sweep, folder)
    write_table(outcome, folder)
    if not outcome.waiting:
        return False
    losses, by_output = dict(outcome.losses), {run.config.output: run for run in outcome.waiting}

    def ended(config: RunConfig) -> None:
        run, parts = by_output[config.output], final_losses(config) or {}
        loss = _loss(run)
        if loss is None:
            raise InputError(f"{run.name} has ended without a held-out loss. See {config.output}.")
        losses[run.name] = loss
        write_table(Outcome(outcome.plan, losses), folder)
        shown = "diverged" if math.isinf(loss) else ", ".join(f"{name} {value:.4f}" for name, value in parts.items())
        done = sum(run.flops for run in outcome.plan.runs if run.name in losses) / outcome.plan.flops
        say(f"{run.name}: {shown} ({len(losses)} of {len(outcome.plan.runs)} runs, {done:.0%} of their FLOPs)")

    pool.train([run.config for run in outcome.waiting], ended)
    return True


def write_sweep(sweep: Sweep, folder: Path) -> Outcome:
    """Writes the runs that have not ended for a scheduler: a configuration each, commands.txt and array.sh.

    A sequential design is written a round at a time: call it again once the runs have ended.

    Args:
      sweep: what to run.
      folder: of the sweep, on a file system that the jobs see.

    Raises:
      InputError: as for `run_sweep`; or the folder cannot be written.
    """
    _check_folder(sweep, folder)
    outcome = collect(sweep, folder)
    lines = []
    for run in outcome.waiting:
        path = folder.absolute() / "configs" / f"{run.name}.py"
        about = f"Run {run.name} of a sweep: {run.flops:.3g} model FLOPs."
        write_run_config(path, _anywhere(run.config), about)
        lines.append(command_line("train", "pretrain", "--config", str(path)))
    write_commands(folder, lines)
    write_table(outcome, folder)
    return outcome


def collect(sweep: Sweep, folder: Path) -> Outcome:
    """The state of a sweep, from the logs of its runs.

    Raises:
      InputError: the sweep is over its budget.
    """
    losses: dict[str, float] = {}
    while True:
        plan = make_plan(sweep, folder, losses)
        found = {}
        for run in plan.runs:
            if run.name not in losses and (loss := _loss(run)) is not None:
                found[run.name] = loss
        if not found:
            return Outcome(plan, losses)
        # Results may bring the next round, whose runs may have ended too.
        losses |= found


def write_table(outcome: Outcome, folder: Path) -> None:
    """Writes the runs that have ended to results.parquet, one a row, in the order of the plan.

    Columns: name, size, status ("ok" or "diverged"), loss (held-out, nats a token; null where it diverged), params
    (weights that a token is multiplied with, the output head among them and the embedding not), active_params (the
    same), total_params, non_embedding_params, tokens, flops (6 params tokens, as in laws), model_flops (with attention,
    without evaluations: what the budget counts), learning_rate, batch_tokens, seed, steps, warmup_steps, length,
    hidden_size, layers, intermediate_size, vocab_size, experts, experts_per_token, granularity (width of a
    dense layer by that of an expert), and a loss_NAME of each held-out set.

    Raises:
      InputError: pyarrow is not installed, or the folder cannot be written.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError(_MISSING) from None
    rows = [_row(run, outcome.losses[run.name]) for run in outcome.plan.runs if run.name in outcome.losses]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, _schema(pa, outcome.plan.runs[0].config)), buffer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / RESULTS, buffer.getvalue())
    except OSError as error:
        raise InputError(f"Cannot write {folder / RESULTS}: {error.strerror}. Give another folder.") from None


def _loss(run: Run) -> float | None:
    """The mean held-out loss of a run, over all tokens; infinite if it diverged, None if it has not ended."""
    what = status(run.config)
    if what == "waiting":
        return None
    return math.inf if what == "diverged" else (final_losses(run.config, whole=True) or {})[""]


def _row(run: Run, loss: float) -> dict[str, Any]:
    model, stage = run.config.model, run.config.stages[0]
    counts, good, moe = model.num_params(), math.isfinite(loss), run.config.model.moe
    parts = final_losses(run.config) or {}
    return {
        "name": run.name,
        "size": run.cell.name,
        "status": "ok" if good else "diverged",
        "loss": loss if good else None,
        "params": counts["active"],
        "active_params": counts["active"],
        "total_params": counts["total"],
        "non_embedding_params": counts["non_embedding"],
        "tokens": run.cell.tokens,
        "flops": compute(counts["active"], run.cell.tokens),
        "model_flops": run.flops,
        "learning_rate": run.learning_rate,
        "batch_tokens": run.batch_tokens,
        "seed": run.seed,
        "steps": stage.steps,
        "warmup_steps": stage.schedule.warmup_steps,
        "length": stage.length,
        "hidden_size": model.hidden_size,
        "layers": model.num_layers,
        "intermediate_size": model.intermediate_size,
        "vocab_size": model.vocab_size,
        "experts": 0 if moe is None else moe.num_experts,
        "experts_per_token": 0 if moe is None else moe.num_experts_per_tok,
        "granularity": None if moe is None else model.intermediate_size / moe.intermediate_size,
        **{f"loss_{name}": parts.get(name) if good else None for name in run.config.held_out},
    }


def _schema(pa: Any, config: RunConfig) -> Any:
    """Columns have their types also where a table is empty or all of a column is null."""
    texts = ("name", "size", "status")
    numbers = (
        "loss",
        "flops",
        "model_flops",
        "learning_rate",
        "granularity",
        *(f"loss_{name}" for name in config.held_out),
    )
    kinds = {**dict.fromkeys(texts, pa.string()), **dict.fromkeys(numbers, pa.float64())}
    names = (
        *("name", "size", "status", "loss", "params", "active_params", "total_params", "non_embedding_params"),
        *("tokens", "flops", "model_flops", "learning_rate", "batch_tokens", "seed", "steps", "warmup_steps", "length"),
        *("hidden_size", "layers", "intermediate_size", "vocab_size", "experts", "experts_per_token", "granularity"),
        *(f"loss_{name}" for name in config.held_out),
    )
    return pa.schema([(name, kinds.get(name, pa.int64())) for name in names])


def _anywhere(config: RunConfig) -> RunConfig:
    """The same run with absolute paths: a job may start in any folder."""

    def absolute(paths: Mapping[str, str]) -> dict[str, str]:
        return {name: str(Path(path).expanduser().absolute()) for name, path in paths.items()}

    return dataclasses.replace(
        config,
        tokenizer=str(Path(config.tokenizer).expanduser().absolute()),
        data=absolute(config.data),
        held_out=absolute(config.held_out),
        initial=None if config.initial is None else str(Path(config.initial).expanduser().absolute()),
    )


def _check_folder(sweep: Sweep, folder: Path) -> None:
    """Records a sweep in its folder. Further sizes, rates, batches, tokens, seeds and FLOPs may follow.

    Data is known by its content. Data that is not on this machine is not compared.

    Raises:
      InputError: the runs there were made of another base, of other models with the same names, or of other data.
    """
    make_plan(sweep, folder, {})  # The budget, before anything is written.
    path = folder / _RECORD
    record: dict[str, Any] = {
        "base": as_json(dataclasses.replace(sweep.base, output=str(folder.absolute()))),
        "models": {
            f"{size}-{shape}" if shape else size: as_json(dataclasses.replace(model, moe=moe))
            for size, model in sweep.sizes.items()
            for shape, moe in sweep.moe.items()
        },
        "warmup": sweep.warmup,
        "content": _content(sweep.base),
    }
    if path.exists():
        before = read_json(path)
        _check_content(folder, before.get("content", {}), record["content"])
        before["content"] = record["content"] = {**record["content"], **before.get("content", {})}
        record["models"] = {**before["models"], **record["models"]}
        same = {**before, "models": {**record["models"], **before["models"]}}
        later = {f"base.{field}": value for field, value in CAME_LATER.items()}
        if found := differences(same, record, later):
            name, (old, new) = next(iter(found.items()))
            raise InputError(
                f"{folder} has a sweep with another {name}: {old!r} there, {new!r} now. Give another folder, or the "
                "same values."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(path, (to_json(record, indent=2) + "\n").encode())
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror}. Give another folder.") from None


def _content(base: RunConfig) -> dict[str, str]:
    """Hashes of the tokenizer and the data of a run, as far as they are on this machine."""
    sources = {f"data.{name}": path for name, path in base.data.items()}
    sources |= {f"held_out.{name}": path for name, path in base.held_out.items()}
    found = {name: data_fingerprint(path) for name, path in sources.items()}
    if Path(base.tokenizer).expanduser().exists():
        found["tokenizer"] = load_tokenizer(base.tokenizer).fingerprint()
    return {name: value for name, value in found.items() if value is not None}


def _check_content(folder: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    for name in before.keys() & now.keys():
        if before[name] != now[name]:
            raise InputError(
                f"The sweep in {folder} was made from other data: the content of {name} has the hash "
                f"{before[name][:12]}... there and {now[name][:12]}... now. Restore the data, or give another folder."
            )


def read_results(folder: Path) -> Sequence[Mapping[str, Any]]:
    """The rows of results.parquet.

    Raises:
      InputError: pyarrow is not installed, or there is no table.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError(_MISSING) from None
    if not (folder / RESULTS).is_file():
        raise InputError(f"{folder} has no {RESULTS}. Run the sweep first.")
    rows: list[dict[str, Any]] = pq.read_table(folder / RESULTS).to_pylist()
    return rows
