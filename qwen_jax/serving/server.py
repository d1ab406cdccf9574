"""Runs the application until a signal, and then lets running requests end."""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from qwen_jax.errors import InputError
from qwen_jax.serving.context import Context

# After the drain limit, requests are ended by the server; they get this long to say so to their clients, and less after
# a second signal.
_GRACE, _SHORT_GRACE = 3, 1


class Server(uvicorn.Server):
    """uvicorn, with a drain that has a limit.

    On SIGTERM or Ctrl-C, no new connections are taken and requests that run go on. Those that still run after
    `drain_timeout` seconds get an error. A second signal ends all of them now, with the same error.
    """

    def __init__(self, config: uvicorn.Config, context: Context) -> None:
        super().__init__(config)
        self._context = context
        self.interrupted = False
        self._signals = 0
        self._draining: asyncio.AbstractEventLoop | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handles a signal; called by Python between two instructions of the event loop."""
        self.interrupted |= sig == signal.SIGINT
        self._signals += 1
        self.should_exit = True
        self._context.draining = True
        if self._signals > 1 and self._draining is not None:
            self._draining.call_soon_threadsafe(self._hurry)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but signals that were handled are not raised again at the end: draining has answered them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {sig: signal.signal(sig, self.handle_exit) for sig in handled}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    def _hurry(self) -> None:
        """Ends requests now, and the server when their clients have been told so."""
        self._context.abort()
        asyncio.get_running_loop().call_later(_SHORT_GRACE, self._force)

    def _force(self) -> None:
        self.force_exit = True
        # Tasks that are cut off now would each show a traceback.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drains; called by uvicorn when the main loop has ended."""
        self._context.draining = True
        running = len(self._context.active) + len(self._context.jobs)
        if running:
            limit = self._context.settings.drain_timeout
            logging.getLogger("qwen_jax").warning(f"Shutting down: {running} requests may run for {limit:g} s more.")
        self._draining = asyncio.get_running_loop()
        timer = self._draining.call_later(self._context.settings.drain_timeout, self._context.abort)
        if self._signals > 1:
            self._hurry()
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
            self._draining = None


def run(app: FastAPI, host: str, port: int, announce: Callable[[str], None]) -> bool:
    """Serves until SIGTERM or Ctrl-C. Returns whether it was Ctrl-C.

    Args:
      app: from `create_app`.
      host: address to listen at.
      port: 0 takes a free one.
      announce: is told the server's address before it serves.

    Raises:
      InputError: the address cannot be listened at.
    """
    context: Context = app.state.context
    config = uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=int(context.settings.drain_timeout) + _GRACE,
        server_header=False,
        # Idle clients are disconnected after this time.
        timeout_keep_alive=30,
    )
    listener = listen(host, port)
    try:
        server = Server(config, context)
        where = f"[{host}]" if ":" in host else host
        announce(f"http://{where}:{listener.getsockname()[1]}")
        server.run(sockets=[listener])
    finally:
        listener.close()
    return server.interrupted


def listen(host: str, port: int) -> socket.socket:
    """Opens the socket to listen at. Raises InputError where that is impossible."""
    if not 0 <= port < 2**16:
        raise InputError(f"--port must be in [0, 65535], got {port}.")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family[0], socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(family[4])
        listener.listen(2048)
    except (OSError, UnicodeError) as error:
        raise InputError(f"Cannot listen at {host}:{port}: {error}. Give another --host or --port.") from None
    return listener
