"""Watches one process from outside: feeds and reads its pipes, and ends it at its limits."""

import contextlib
import dataclasses
import os
import selectors
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO

# Seconds that a killed process may take to disappear and its pipes to close.
GRACE = 5.0
# Seconds between looks at what the process uses.
_TICK = 0.025
_CHUNK = 1 << 16


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended.

    Args:
      status: of the process that was started: its exit status, -n after signal n, None if it could not be killed.
      stdout: what it wrote, up to the limit; empty if its standard output was not captured.
      stderr: the same of standard error.
      seconds: wall-clock time.
      killed_by: the limit at which it was killed, "stop" if it was asked to, or None.
      open: whether something still holds its pipes.
    """

    status: int | None
    stdout: bytes
    stderr: bytes
    seconds: float
    killed_by: str | None
    open: bool


def supervise(
    process: "subprocess.Popen[bytes]",
    *,
    stdin: bytes,
    seconds: float,
    output_bytes: int,
    kill: Callable[[], None],
    watch: Callable[[], str | None],
    stop: threading.Event | None = None,
    patience: float = GRACE,
) -> Ended:
    """Serves a process until it has ended, by itself or at a limit.

    Args:
      process: its stdin and stdout are pipes or connected to something else (None here); its stderr is a pipe.
      stdin: bytes to feed to it. It need not read them.
      seconds: wall-clock time after which it is killed.
      output_bytes: bytes of each of stdout and stderr beyond which it is killed.
      kill: ends the process and all that it has started.
      watch: called at each tick; returns the name of a limit that is exceeded, or None.
      stop: is set by another thread to have the process killed.
      patience: seconds to wait, after its end, for those that hold its pipes.
    """
    began = looked = time.monotonic()
    read: dict[IO[bytes], bytearray] = {pipe: bytearray() for pipe in (process.stdout, process.stderr) if pipe}
    feed = memoryview(stdin)
    killed_by: str | None = None
    # When reading must end whatever happens; set once the process has ended or has been killed.
    give_up: float | None = None
    try:
        with selectors.DefaultSelector() as selector, _end_of(process) as end:
            for pipe in read:
                os.set_blocking(pipe.fileno(), False)
                selector.register(pipe, selectors.EVENT_READ)
            if process.stdin is not None:
                os.set_blocking(process.stdin.fileno(), False)
                selector.register(process.stdin, selectors.EVENT_WRITE)
            if end is not None:
                selector.register(end, selectors.EVENT_READ)
            while True:
                # Move what can be moved.
                over = False
                for key, _ in selector.select(max(0.0, looked + _TICK - time.monotonic())):
                    if key.fileobj is process.stdin:
                        feed = _write(process.stdin, feed, selector)
                    elif key.fileobj in read:
                        over |= _read(key.fileobj, read[key.fileobj], output_bytes, selector)
                    else:
                        selector.unregister(key.fileobj)
                # Has it ended? Then only the rest of the output is read.
                now = time.monotonic()
                ended = process.poll() is not None
                if ended and give_up is None:
                    give_up = now + patience
                pipes = any(pipe in selector.get_map() for pipe in read)
                if (ended and not pipes) or (give_up is not None and now > give_up):
                    break
                # Does it exceed a limit? Output may also exceed it after the end.
                if killed_by is None:
                    if over:
                        killed_by = "output"
                    elif not ended:
                        if now - began > seconds:
                            killed_by = "time"
                        elif stop is not None and stop.is_set():
                            killed_by = "stop"
                        elif now - looked >= _TICK:
                            killed_by, looked = watch(), now
                    if killed_by is not None:
                        kill()
                        give_up = now + patience
    finally:
        # Also after an exception, such as Ctrl-C in the main thread.
        if process.poll() is None:
            kill()
        for stream in (process.stdin, *read):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
    status: int | None = None
    for last_resort in (process.kill, lambda: None):
        try:
            status = process.wait(GRACE)
            break
        except subprocess.TimeoutExpired:
            last_resort()
    stdout, stderr = (bytes(read[pipe][:output_bytes]) if pipe else b"" for pipe in (process.stdout, process.stderr))
    return Ended(status, stdout, stderr, time.monotonic() - began, killed_by, pipes)


@contextlib.contextmanager
def _end_of(process: "subprocess.Popen[bytes]") -> Iterator[int | None]:
    """A descriptor that becomes readable when the process ends, where the system has them."""
    if not hasattr(os, "pidfd_open"):
        yield None
        return
    descriptor = os.pidfd_open(process.pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write(pipe: IO[bytes], feed: memoryview, selector: selectors.BaseSelector) -> memoryview:
    """Feeds a pipe; closes it when all is written or nobody reads. Returns what is left."""
    try:
        feed = feed[os.write(pipe.fileno(), feed[:_CHUNK]) :] if feed else feed
    except BlockingIOError:
        return feed
    except BrokenPipeError:
        feed = memoryview(b"")
    if not feed:
        selector.unregister(pipe)
        pipe.close()
    return feed


def _read(pipe: IO[bytes], into: bytearray, limit: int, selector: selectors.BaseSelector) -> bool:
    """Reads from a pipe. Returns whether there is more than may be; the rest is not kept."""
    try:
        chunk = os.read(pipe.fileno(), _CHUNK)
    except BlockingIOError:
        return False
    if not chunk:
        selector.unregister(pipe)
    if len(into) <= limit:
        into += chunk
    return len(into) > limit
