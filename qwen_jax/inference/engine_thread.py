"""The thread of an engine: it carries out commands of other threads between the steps of the device."""

import collections
import concurrent.futures
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Self, TypeVar

import jax
from jax.sharding import Mesh

from qwen_jax.inference.active import Active, Times
from qwen_jax.inference.hosts import Hosts
from qwen_jax.inference.steps import Steps
from qwen_jax.parallel.placing import is_shared

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class EngineThread:
    """What runs in the thread of an engine, and how other threads reach it. An engine derives from it.

    Attributes:
      mesh: the thread's.
      patience: seconds that process 0's update of the weights waits for this process, if it does not lead. An update
        that has begun to wait keeps the value that it found.
      on_finished: called with each request's times when it ends, for metrics; see `Times`.
    """

    _steps: Steps

    def __init__(self, mesh: Mesh):
        """
        Args:
          mesh: of the parameters.

        Raises:
          InputError: a mesh with devices of several processes, but not of all.
        """
        self.mesh = mesh
        self._hosts = Hosts(mesh) if is_shared(mesh) else None
        self.patience = 600.0
        self.on_finished: Callable[[Times], None] | None = None
        # What the engine's thread does between two steps: all commands, and one piece of work, which may take long.
        self._commands: collections.deque[Callable[[], None]] = collections.deque()
        self._work: collections.deque[Callable[[], None]] = collections.deque()
        self._submitted: dict[int, Active] = {}
        self._wake = threading.Condition()
        self._closing = False
        # Updates of process 0 that did not find this process in time; as many calls here come too late.
        self._missed = 0
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def _start_thread(self) -> None:
        """Starts the thread, once there is everything that it needs."""
        self._thread.start()

    # --- what callers use ---

    @property
    def leads(self) -> bool:
        """Whether requests are given to the engine here: in process 0, if the mesh has devices of several processes."""
        return self._hosts is None or self._hosts.leads

    def close(self, drain: float = 0.0) -> None:
        """Ends the engine. In processes that do not lead, waits for the end.

        Args:
          drain: seconds that requests have to end; those that do not are cancelled.

        Raises:
          RuntimeError: in a process that does not lead, if the engine has failed there or in process 0.
        """
        if not self.leads:
            with self._wake:
                self._closing = True
                self._wake.notify_all()
            self._thread.join()
            if self._failure is not None:
                raise RuntimeError(f"The engine has stopped: {self._failure}") from self._failure
            return
        end = time.monotonic() + drain
        while time.monotonic() < end and self._failure is None:
            if self._steps.idle and not (self._commands or self._work or self._submitted):
                break
            time.sleep(0.01)
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # A process that fails ends; process 0 cannot know that it should end the engine.
        if self.leads or error is None:
            self.close()

    def _check_leads(self) -> None:
        """Raises RuntimeError if requests are given to the engine in another process."""
        if not self.leads:
            raise RuntimeError(
                f"This is process {jax.process_index()}, and process 0 gives the engine its requests (engine.leads). "
                "Here, update its weights when process 0 does, and close it, which waits for the end."
            )

    def call(self, function: Callable[[], _T]) -> _T:
        """Runs a function between two steps, in the engine's thread, and returns its result."""
        future: concurrent.futures.Future[_T] = concurrent.futures.Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._post(run, self._work)
        while True:
            try:
                return future.result(timeout=1.0)
            except concurrent.futures.TimeoutError:
                if not self._thread.is_alive() and not future.done():
                    raise RuntimeError("The engine has stopped.") from self._failure

    def _cancel(self, number: int) -> None:
        with contextlib.suppress(RuntimeError):  # A stopped engine has ended the request.
            self._post(lambda: self._abort(number), self._commands)

    def _queue(self, number: int) -> None:
        active = self._submitted.pop(number, None)
        if active is not None:
            self._steps.add(active)

    def _abort(self, number: int) -> None:
        """Ends a request, whether it was queued already or not."""
        active = self._submitted.pop(number, None)
        if active is None:
            self._steps.abort(number)
        else:
            active.row.finish_reason = "abort"
            self._report_finished(active.end())

    def _report_finished(self, times: Times) -> None:
        if self.on_finished is not None:
            try:
                self.on_finished(times)
            except Exception:
                _log.exception("on_finished failed; the engine goes on.")

    def _post(self, command: Callable[[], None], queue: "collections.deque[Callable[[], None]]") -> None:
        """Has the engine's thread run something between two steps."""
        with self._wake:
            if self._failure is not None or self._closing:
                raise RuntimeError("The engine has stopped.") from self._failure
            if self._missed:
                self._missed -= 1
                raise RuntimeError(
                    f"Process 0 updated the weights and waited {self.patience:g} s for this process, which comes too "
                    "late: all go on with the weights that they have. Update again in all processes, or raise patience."
                )
            queue.append(command)
            self._wake.notify_all()

    # --- the engine's thread ---

    def _run(self) -> None:
        """Carries out commands and steps until the engine is closed. A failure of the device ends all requests."""
        try:
            with jax.set_mesh(self.mesh):
                if self._hosts is None or self._hosts.leads:
                    self._lead()
                else:
                    self._hosts.follow(self._update)
        except BaseException as error:
            _log.exception("The engine has stopped.")
            self._failure = error
        with self._wake:
            self._closing = True
        # Every reader hears of the end; callers of `call` see that the thread has ended.
        for active in [*self._submitted.values(), *self._steps.active.values()]:
            if self._failure is None:
                self._abort(active.scheduled.id)
            else:
                active.stream.fail(self._failure)
        self._steps.readers.wake()
        # The other processes hear of it last: if one of them is lost, this may wait for it.
        if self._hosts is not None and self._hosts.leads:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # The others are gone.
                failure = self._failure
                self._hosts.tell("end", f"{type(failure).__name__}: {failure}" if failure else "")

    def _lead(self) -> None:
        while self._wait():
            while self._commands:
                self._commands.popleft()()
            self._steps.readers.wake()
            # At most one piece of other work between two steps: texts that run do not wait for more.
            if self._work:
                self._work.popleft()()
            # Who asked for the work got its error; but the other processes may have run the program that failed here.
            if self._hosts is not None and self._hosts.failure is not None:
                raise self._hosts.failure
            self._steps.run()

    def _update(self) -> None:
        """Takes the weights that this process was given, or will be: process 0 has begun to take its own."""
        with self._wake:
            self._wake.wait_for(lambda: self._work or self._closing, self.patience)
            take = self._work.popleft() if self._work else None
            if take is None:
                self._missed += 1
                absent = "has closed its engine" if self._closing else f"has not done so for {self.patience:g} s"
        if take is not None:
            take()
            return
        try:
            self._take_together(lambda: None, absent)
        except RuntimeError:
            _log.exception("All processes go on with the weights that they have.")

    def _take_together(self, take: Callable[[], None], absent: str = "") -> None:
        """Takes new weights in all processes of the mesh or, if it fails in one, in none.

        Args:
          take: takes those of this process.
          absent: why this process has none.
        """
        if self._hosts is None:
            take()
            return

        def be_there() -> None:
            if absent:
                raise RuntimeError(
                    f"Process 0 updates the weights, and process {jax.process_index()} {absent}. Call update_weights "
                    "as often in all processes."
                )

        # First all are there: taking weights starts programs that wait for the other processes.
        self._hosts.together("Updating the weights", be_there)
        self._hosts.together("Updating the weights", take)

    def _wait(self) -> bool:
        """Waits until there is something to do; returns False if the engine is closed."""
        with self._wake:
            while self._steps.idle and not self._commands and not self._work and not self._closing:
                self._wake.wait()
            return not self._closing
