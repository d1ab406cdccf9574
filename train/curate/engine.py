"""The engine of a curation: Daft, on one machine or on a Ray cluster. A job is a row of a data frame."""

import contextlib
import dataclasses
import errno
import importlib
import json
import os
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from qwen_jax.errors import NO_ROOM, InputError
from train.curate.ending import Ending
from train.data.documents import optional_library
from train.data.workers import cores

Kind = Literal["native", "ray"]
Job = Callable[[Any], Any]
"""Does a job in a worker: a JSON value in, a JSON value out."""

# After so many failures the other jobs would most likely fail too.
_MOST_FAILED = 8
# Workers are started once the code of a job is there, and wait this long for devices on a cluster.
_READY_SECONDS = 1800
_ENVIRONMENT = {
    # No telemetry; and no progress bar of the engine's own beside ours.
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "DAFT_PROGRESS_BAR": "0",
}
_runner: tuple[Kind, str | None] | None = None  # Daft has one runner in a process.


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a worker needs. None of this changes results.

    Attributes:
      workers: how many at most; None is the number of the engine.
      gpus: of each worker.
      ray_options: of each worker's Ray actor, such as `{"resources": {"TPU": 4}}`.
    """

    workers: int | None = None
    gpus: float = 0
    ray_options: Mapping[str, Any] | None = None


class Engine:
    """Runs jobs in workers, and queries of Daft.

    Attributes:
      kind: "native" is one machine, "ray" a Ray cluster.
      workers: workers of a `map`.
      partitions: partitions of a shuffle.
    """

    def __init__(
        self,
        kind: Kind = "native",
        workers: int | None = None,
        address: str | None = None,
        scratch: Path | None = None,
    ):
        """Imports and starts Daft.

        Args:
          kind: "native" or "ray".
          workers: by default the cores of this machine or of the cluster.
          address: of a Ray cluster; None is `RAY_ADDRESS`, or else a Ray of this machine, which is started.
          scratch: a folder that all workers see, for what a shuffle spills and for the sign to end; by default a
            temporary one of this machine.

        Raises:
          InputError: Daft or Ray is not installed or cannot be started; this process has another engine.
        """
        if workers is not None and workers < 1:
            raise InputError(f"workers must be at least 1, got {workers}.")
        self.kind: Kind = kind
        self._daft = _start(kind, address)
        self.workers = workers or (_cluster_cores(address) if kind == "ray" else cores())
        self.partitions = self.workers if kind == "native" else 2 * self.workers
        self._scratch = scratch or Path(tempfile.gettempdir()) / f"qwen-jax-curate-{os.getpid()}"

    @property
    def daft(self) -> types.ModuleType:
        """The Daft module, with its runner set, for queries."""
        spill = {}
        if self.kind == "ray":
            spill = {"shuffle_algorithm": "flight_shuffle", "flight_shuffle_dirs": [str(self._scratch / "shuffle")]}
        self._daft.set_execution_config(shuffle_aggregation_default_partitions=self.partitions, **spill)
        return self._daft

    def map(
        self,
        what: str,
        make: Callable[[], Job],
        jobs: Sequence[tuple[str, Any]],
        resources: Resources | None = None,
        light: bool = False,
    ) -> Iterator[tuple[str, Any]]:
        """Does jobs in workers.

        Args:
          what: name of the work, for messages.
          make: is called once in each worker and returns the function that does a job. It is pickled, also where its
            module is a file that the user gave.
          jobs: name and JSON value of each.
          resources: of a worker.
          light: whether jobs do little besides reading and writing. They may then run in threads of this process, and
            no process has to be started.

        Yields:
          The name of a job and its result, in the order in which jobs end.

        Raises:
          InputError: jobs failed or a worker died. The other jobs are done first, unless the disk is full or too many
            jobs failed.
        """
        if not jobs:
            return
        resources = resources or Resources()
        workers = min(resources.workers or self.workers, len(jobs))
        failed: dict[str, str] = {}
        answered = 0
        with Ending(self._scratch / f"stop-{os.getpid()}") as ending:
            rows = self._rows(_pickled(make), jobs, workers, resources, ending.file, light)
            try:
                for name, answer in rows:
                    answered += 1
                    ending.take_signals()
                    if "done" in answer:
                        yield name, answer["done"]
                    elif "failed" in answer:
                        failed[name] = answer["failed"]
                        if answer["hopeless"] or len(failed) >= _MOST_FAILED:
                            break
            except Exception as error:
                # Daft raises RuntimeError for a process that is gone, and Ray an exception of its own.
                if not ending.signal:
                    raise InputError(
                        f"A worker of {what} has ended, most likely because memory ran out: {_last_line(error)} "
                        "Finished shards are kept: run the same command again, with fewer --workers or smaller shards."
                    ) from error
            finally:
                if answered < len(jobs):
                    ending.ask()
                rows.close()
        if failed:
            raise InputError(_failures(what, failed, len(jobs)))
        if answered < len(jobs):
            raise KeyboardInterrupt  # Ctrl-C before the first answer: Daft ends a query without an exception.

    def _rows(
        self,
        make: bytes,
        jobs: Sequence[tuple[str, Any]],
        workers: int,
        resources: Resources,
        stop: Path,
        light: bool,
    ) -> Generator[tuple[str, Mapping[str, Any]], None, None]:
        daft = self.daft
        # Results come as jobs end; a slow job holds no other back.
        daft.set_execution_config(maintain_order=False, actor_udf_ready_timeout=_READY_SECONDS)
        content = {"name": [name for name, _ in jobs], "job": [json.dumps(job) for _, job in jobs]}
        frame = daft.from_pydict(content)
        if self.kind == "ray":
            frame = frame.into_partitions(min(len(jobs), 8 * workers))
        options: dict[str, Any] = {"use_process": True, "max_concurrency": workers}
        if self.kind == "native" and (light or workers == 1):
            options = {"use_process": False}
        if resources.gpus:
            options["gpus"] = resources.gpus
        if resources.ray_options and self.kind == "ray":
            options["ray_options"] = dict(resources.ray_options)
        _Actor.run = daft.method.batch(return_dtype=daft.DataType.string(), batch_size=1)(_Actor.answer)
        actor = daft.cls(_Actor, **options)(make, str(stop), light)
        frame = frame.select(frame["name"], actor.run(frame["job"]).alias("answer"))
        for row in frame.iter_rows(results_buffer_size=1):
            yield row["name"], json.loads(row["answer"])


class _Actor:
    """Does jobs in a worker, which Daft starts."""

    run: Any

    def __init__(self, make: bytes, stop: str, light: bool):
        self._make, self._stop, self._light = make, Path(stop), light
        self._job: Job | None = None
        self._lock = threading.Lock()

    def answer(self, job: Any) -> list[str]:
        """Jobs as JSON in, answers as JSON out; no exception of a job leaves it."""
        # Without a process of its own, Daft calls from several threads.
        with contextlib.nullcontext() if self._light else self._lock:
            return [json.dumps(self._answer(content)) for content in job.to_pylist()]

    def _answer(self, content: str) -> dict[str, Any]:
        if self._stop.exists():
            return {"stopped": True}
        try:
            if self._job is None:
                self._job = importlib.import_module("daft.pickle").loads(self._make)()
        except Exception as error:
            return {"failed": _explain(error), "hopeless": True}
        try:
            return {"done": self._job(json.loads(content))}
        except Exception as error:
            full = isinstance(error, OSError) and error.errno in NO_ROOM
            return {"failed": _explain(error), "hopeless": full}


def _explain(error: Exception) -> str:
    """What went wrong in a worker, in words for people."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return f"{os.strerror(error.errno or errno.ENOSPC)}. Make room and run the same command again."
    if isinstance(error, MemoryError):
        return "The machine has no memory left. Run the same command again with fewer --workers or smaller shards."
    return "".join(traceback.format_exception(error)).rstrip()


def _failures(what: str, failed: Mapping[str, str], jobs: int) -> str:
    """One message for all failures; equal ones are told once."""
    by_text: dict[str, list[str]] = {}
    for name, text in failed.items():
        by_text.setdefault(text, []).append(name)
    told = [f"{what}, {_names(names)}: {text}" for text, names in list(by_text.items())[:3]]
    more = "" if len(by_text) <= 3 else f"\nand {len(by_text) - 3} other failures."
    return "\n".join(told) + f"{more} ({len(failed)} of {jobs} shards failed; finished ones are kept.)"


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _last_line(error: Exception) -> str:
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1][:400]


def _pickled(make: Callable[[], Job]) -> bytes:
    """Pickles a function; modules of files that the user gave go with it, because workers cannot import them."""
    pickle = importlib.import_module("daft.pickle")
    cloudpickle = pickle.cloudpickle
    own = [
        module
        for name, module in list(sys.modules.items())
        if getattr(module, "__file__", None) and "." not in name and _is_given(name)
    ]
    for module in own:
        cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(pickle.dumps(make))
    finally:
        for module in own:
            cloudpickle.unregister_pickle_by_value(module)


def _is_given(name: str) -> bool:
    """Whether a module is one of `train.python_file`, which gives it a name of its own."""
    return name.startswith("curation_")


def _start(kind: Kind, address: str | None) -> types.ModuleType:
    global _runner
    os.environ.update(_ENVIRONMENT)
    _let_workers_import()
    daft = optional_library("daft", "Curations")
    if _runner is not None and _runner != (kind, address):
        raise InputError(f"This process runs the engine {_runner[0]} already. Use another process for {kind}.")
    if _runner is None:
        if kind == "ray":
            optional_ray()
        try:
            daft.set_runner_ray(address) if kind == "ray" else daft.set_runner_native()
        except Exception as error:
            # A query of another part of this process may have started the native runner.
            if kind == "ray" or daft.runners.get_or_infer_runner_type() != "native":
                raise InputError(f"The engine {kind} cannot be started: {_last_line(error)}") from error
        _runner = (kind, address)
    return daft


def _let_workers_import() -> None:
    """Workers import this package from where it is, and nothing of that name from the working directory."""
    os.environ["PYTHONSAFEPATH"] = "1"
    root = Path(__file__).resolve().parents[2]
    known = os.environ.get("PYTHONPATH", "")
    if root.name not in ("site-packages", "dist-packages") and str(root) not in known.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join([str(root), *([known] if known else [])])


def optional_ray() -> types.ModuleType:
    """Ray.

    Raises:
      InputError: it is not installed.
    """
    try:
        import ray
    except ImportError:
        raise InputError("The engine ray needs Ray, which is not installed: pip install 'qwen-jax[data,ray]'") from None
    module: types.ModuleType = ray
    return module


def _cluster_cores(address: str | None) -> int:
    ray = optional_ray()
    if not ray.is_initialized():
        ray.init(address)
    return max(int(ray.cluster_resources().get("CPU", 1)), 1)
