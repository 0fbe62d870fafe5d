# SPDX-License-Identifier: Apache-2.0
"""The probe's one place to wait: for time, for a file descriptor, for SIGTERM, answering scrapes meanwhile.

One thread does everything, because a process with threads cannot be forked safely (see `child`).
"""

import selectors
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import HTTPServer
from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry, MetricsHandler

from ..errors import Stopped

SCRAPE_SECONDS = 2.0
"""The longest one scrape may keep the probe waiting for its request."""


class Waiter:
    """Waits, and serves `/metrics` on `port` (0 = any free one) where a port is given.

    As a context manager it answers SIGTERM and SIGINT by ending every wait at once, with `stopping` set, and
    what is `interruptible`.
    """

    def __init__(self, registry: CollectorRegistry, port: int | None) -> None:
        self.stopping = False
        self._raising = False
        self._selector = selectors.DefaultSelector()
        self._server: HTTPServer | None = None
        if port is not None:
            handler = type("Handler", (MetricsHandler,), {"registry": registry, "timeout": SCRAPE_SECONDS})
            self._server = HTTPServer(("", port), handler)
            self._server.timeout = 0
            self._selector.register(self._server, selectors.EVENT_READ)
        self._signalled, self._signal = socket.socketpair()
        self._signalled.setblocking(False)
        self._signal.setblocking(False)
        self._selector.register(self._signalled, selectors.EVENT_READ)

    @property
    def port(self) -> int | None:
        """The port that is served, or None."""
        return self._server.server_port if self._server else None

    def __enter__(self) -> Self:
        signal.set_wakeup_fd(self._signal.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in (
            (signal.SIGTERM, signal.SIG_DFL),
            (signal.SIGINT, signal.default_int_handler),
        ):
            signal.signal(number, handler)
        self._selector.close()
        self._signalled.close()
        self._signal.close()
        if self._server:
            self._server.server_close()

    def sleep(self, seconds: float) -> None:
        """Wait so many seconds."""
        self._wait(seconds, None)

    def readable(self, descriptor: int, seconds: float) -> bool:
        """Wait until the descriptor is readable, at most so many seconds; say whether it is."""
        self._selector.register(descriptor, selectors.EVENT_READ)
        try:
            return self._wait(seconds, descriptor)
        finally:
            self._selector.unregister(descriptor)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Have SIGTERM and SIGINT raise Stopped: for calls that wait elsewhere, such as on an API server."""
        self._raising = True
        try:
            if self.stopping:
                raise Stopped
            yield
        finally:
            self._raising = False

    def _wait(self, seconds: float, descriptor: int | None) -> bool:
        end = time.monotonic() + seconds
        while not self.stopping:
            ready = {key.fileobj for key, _ in self._selector.select(max(0.0, end - time.monotonic()))}
            if descriptor in ready:
                return True
            if self._server in ready and self._server is not None:
                self._server.handle_request()
            if time.monotonic() >= end:
                return False
        return False

    def _stop(self, number: int, frame: object) -> None:
        self.stopping = True
        if self._raising:
            # Once: nothing may come between what the first one unwinds.
            self._raising = False
            raise Stopped
