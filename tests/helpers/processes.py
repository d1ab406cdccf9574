"""Several JAX processes with fake CPU devices, joined as the hosts of one cluster: what a test runs in them.

def job(folder: str) -> list[float]:  # at the top level of a test module
    mesh = make_mesh({"fsdp": 4})     # over the devices of all processes
    ...

first, second = run(job, str(tmp_path), processes=2, devices=2)

with train("config.py", processes=2) as job:  # the real command
    assert job.wait() == [0, 0]
"""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any


class ProcessError(AssertionError):
    """A process failed or took too long; the message has what each of them wrote."""


def run(
    function: Callable[..., Any] | str | Path,
    *args: Any,
    processes: int = 2,
    devices: int = 1,
    timeout: float = 600.0,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """Calls a function once in each of several new processes that form one JAX cluster on the CPU.

    Args:
      function: at the top level of an importable module, such as the test's own; or the path of a script, which is run
        as `__main__` with `args` as its `sys.argv[1:]`.
      *args: the same for every process; picklable, and strings for a script.
      processes: how many; `jax.process_index()` tells them apart.
      devices: fake CPU devices in each process.
      timeout: seconds until all of them are ended.
      env: environment variables on top of this process's own.

    Returns:
      What the function returned in each process (None for a script), by process index.

    Raises:
      ProcessError: a process failed or the time is over; the others are ended first.
    """
    script = isinstance(function, (str, Path))
    target = str(function) if script else (function.__module__, function.__qualname__)
    environment = {**os.environ, **(env or {}), "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    with tempfile.TemporaryDirectory(prefix="qwen-jax-processes-") as name, reserved_port() as port:
        folder = Path(name)
        task = {"target": target, "args": args, "address": f"127.0.0.1:{port}", "processes": processes}
        (folder / "task").write_bytes(pickle.dumps({**task, "devices": devices, "timeout": timeout}))
        command = [sys.executable, __file__, name]
        started: list[subprocess.Popen[bytes]] = []
        try:
            for i in range(processes):
                with (folder / f"output-{i}").open("wb") as output:
                    started.append(
                        subprocess.Popen(
                            [*command, str(i)],
                            env=environment,
                            stdin=subprocess.DEVNULL,
                            stdout=output,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,
                        )
                    )
            problem = _wait(started, timeout)
        finally:
            for process in started:
                _end(process)
        if problem:
            outputs = (f"--- process {i} ---\n{_tail(folder / f'output-{i}')}" for i in range(processes))
            raise ProcessError("\n".join([problem, *outputs]))
        return [pickle.loads((folder / f"result-{i}").read_bytes()) for i in range(processes)]


class Job:
    """Processes of a command that form one job.

    Attributes:
      started: by process index.
    """

    def __init__(self, folder: Path) -> None:
        self.started: list[subprocess.Popen[bytes]] = []
        self._folder = folder

    def output(self, index: int) -> str:
        """What a process has written so far, standard output and error together."""
        return _tail(self._folder / f"output-{index}", 20_000)

    def wait(self, timeout: float = 300.0) -> list[int]:
        """Waits for all; their exit statuses.

        Raises:
          ProcessError: one is not done in time.
        """
        deadline = time.monotonic() + timeout
        while None in [process.poll() for process in self.started]:
            if time.monotonic() > deadline:
                raise ProcessError(f"Not done within {timeout:g} seconds.\n{self}")
            time.sleep(0.02)
        return [process.returncode for process in self.started]

    def __str__(self) -> str:
        codes = [process.poll() for process in self.started]
        outputs = (f"--- process {i} ---\n{self.output(i)}" for i in range(len(codes)))
        return "\n".join([f"Exit statuses (None is still running): {codes}", *outputs])


@contextlib.contextmanager
def train(
    config: str | os.PathLike[str], *changes: str, options: Sequence[str] = (), **launching: Any
) -> Iterator[Job]:
    """Starts `qwen-jax train pretrain`, once or as several processes that find each other; ends them when it is left.

    Args:
      config: for `--config`.
      *changes: for `--set`.
      options: further ones.
      **launching: for `launch`.
    """
    command = ["train", "pretrain", "--config", os.fspath(config), *options]
    with launch([*command, "--set", *changes] if changes else command, **launching) as job:
        yield job


@contextlib.contextmanager
def launch(
    arguments: Sequence[str],
    processes: int = 1,
    devices: int = 1,
    env: dict[str, str] | None = None,
    launcher: Sequence[str] = (),
) -> Iterator[Job]:
    """Starts a command of `qwen-jax`, once or as several processes that find each other; ends them when it is left.

    Args:
      arguments: of the command.
      processes: how many.
      devices: fake CPU devices in each process.
      env: environment variables on top of this process's own.
      launcher: a command that the last process is started with, such as `prlimit`.
    """
    root = str(Path(__file__).parents[2])
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": os.pathsep.join([root, *sys.path]),
        **(env or {}),
    }
    command = [sys.executable, "-m", "qwen_jax", *arguments]
    with tempfile.TemporaryDirectory(prefix="qwen-jax-job-") as name, reserved_port() as port:
        job = Job(Path(name))
        try:
            for i in range(processes):
                place = [
                    "--coordinator",
                    f"127.0.0.1:{port}",
                    "--num-processes",
                    str(processes),
                    "--process-id",
                    str(i),
                ]
                with (Path(name) / f"output-{i}").open("wb") as output:
                    job.started.append(
                        subprocess.Popen(
                            [*(launcher if i == processes - 1 else ()), *command, *(place if processes > 1 else ())],
                            env=environment,
                            stdin=subprocess.DEVNULL,
                            stdout=output,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,
                        )
                    )
            yield job
        finally:
            for process in job.started:
                _end(process)


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A TCP port of this machine that nobody listens on, and that the system gives to nobody else meanwhile."""
    with socket.socket() as probe:
        # JAX's coordinator, which sets the same option, may listen there all the same.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]


def _wait(started: list["subprocess.Popen[bytes]"], timeout: float) -> str:
    """Waits for all; says what went wrong, or nothing."""
    deadline = time.monotonic() + timeout
    while True:
        codes = [process.poll() for process in started]
        if any(codes):
            time.sleep(0.5)  # The others may fail for the same reason, and say so.
            codes = [process.poll() for process in started]
            return f"Exit statuses of the processes (None was still running): {codes}."
        if None not in codes:
            return ""
        if time.monotonic() > deadline:
            return f"Not done within {timeout:g} seconds; exit statuses (None was still running): {codes}."
        time.sleep(0.05)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a process and what it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(path: Path, count: int = 8000) -> str:
    return path.read_bytes()[-count:].decode("utf-8", errors="replace")


def _main(folder: Path, index: int) -> None:
    """One of the processes."""
    import importlib
    import runpy

    import jax

    task = pickle.loads((folder / "task").read_bytes())
    jax.config.update("jax_num_cpu_devices", task["devices"])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        task["address"], task["processes"], index, initialization_timeout=int(task["timeout"]) + 1
    )
    result = None
    if isinstance(task["target"], str):
        sys.argv = [task["target"], *task["args"]]
        try:
            runpy.run_path(task["target"], run_name="__main__")
        except SystemExit as exit_:
            if exit_.code:
                raise
    else:
        module, name = task["target"]
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
        result = function(*task["args"])
    (folder / f"result-{index}").write_bytes(pickle.dumps(result))
    # Nobody leaves before all are done: the cluster takes a process that is gone for a failure of all.
    jax.distributed.shutdown()


if __name__ == "__main__":
    try:
        _main(Path(sys.argv[1]), int(sys.argv[2]))
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # An ordinary exit would wait for the other processes, and they for this one.
