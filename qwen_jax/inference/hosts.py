"""An engine in several processes: process 0 plans and reads, the others run the same programs with the same arrays."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qwen_jax.errors import InputError
from qwen_jax.inference.row_sampling import SLOT
from qwen_jax.inference.runner_lowering import Program
from qwen_jax.inference.runner_state import RunnerState
from qwen_jax.parallel.broadcast import Broadcast, Exchange, Message


class Hosts:
    """The processes of an engine's mesh, which must be all of the job.

    Requests, schedules, texts and grammars are in process 0 alone, which leads. The others know none of them, so that
    nothing there has to be computed twice in the same way: not clocks, nor threads, nor the order of arrivals.

    Attributes:
      leads: whether this process does.
      failure: of a program that this process, which leads, has told the others to run: from then on their states may
        differ. None if there was none.
    """

    def __init__(self, mesh: Mesh) -> None:
        """
        Args:
          mesh: with devices of several processes.

        Raises:
          InputError: it has none of some process.
        """
        processes = sorted({device.process_index for device in mesh.devices.flat})
        if len(processes) < jax.process_count():
            raise InputError(
                f"The mesh has devices of {len(processes)} of {jax.process_count()} processes. Use devices of one "
                "process, or of all."
            )
        self._broadcast, self._exchange, self._runners = Broadcast(), Exchange(), list[RunnerState]()
        self.failure: Exception | None = None
        self.leads = self._broadcast.sends

    def add(self, runner: RunnerState) -> None:
        """Has the other processes run the programs of a runner. All processes add theirs in the same order."""
        number = len(self._runners)
        self._runners.append(runner)

        in_decode = -3 - bool(runner.static.options.adapter_ranks)
        slot_columns = {"decode": in_decode, "verify": in_decode, "sample": SLOT, "sample verified": SLOT}

        @contextlib.contextmanager
        def tell(program: Program, arrays: Sequence[np.ndarray]) -> Iterator[None]:
            # From step to step, page tables change in few places; and rows move when a text before them has ended.
            like, column = f"{number} {program.name}", slot_columns.get(program.kind)
            # Arrays of masks are written again, and the broadcast keeps what it has sent.
            kept = [x.copy() for x in arrays]
            self._broadcast.send({"runner": number, "program": dataclasses.astuple(program)}, kept, like, column)
            try:
                yield
            except Exception as error:
                self.failure = error
                raise

        if self.leads:
            runner.on_program = tell

    def tell(self, what: str, why: str = "") -> None:
        """Tells the others what to do beside programs.

        Args:
          what: "compile" all programs, "update" the weights, or "end", with an error if there is a reason.
          why: the reason.
        """
        self._broadcast.send({"do": what, "why": why})

    def together(self, what: str, work: Callable[[], None]) -> None:
        """Does some work that succeeds in every process or fails in every one; see `Exchange.share`."""

        def share() -> Message:
            work()
            return None, []

        self._exchange.share(what, share)

    def follow(self, update: Callable[[], None]) -> None:
        """Does what process 0 does, until that ends.

        Args:
          update: takes the weights that this process was given.

        Raises:
          RuntimeError: the engine of process 0 has failed.
        """
        while True:
            message, arrays = self._broadcast.receive()
            if "program" in message:
                program: Any = Program(*message["program"])
                self._runners[message["runner"]].repeat(program, arrays)
            elif message["do"] == "compile":
                for runner in self._runners:
                    runner.compile()
            elif message["do"] == "update":
                update()
            elif message["why"]:
                raise RuntimeError(f"The engine has failed in process 0: {message['why']}")
            else:
                return
