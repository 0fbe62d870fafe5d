# SPDX-License-Identifier: Apache-2.0
"""Turns at something that serves one call at a time, shared fairly by namespaces."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """Gives the next turn to the waiting namespace that has had the least time.

    A namespace without calls saves no time up: at its next call it counts as having had at least what the
    latest one served had. So neither one that was silent for long nor a new one stands before the others for
    long, and a namespace waits at most until each other one has had as much time, whatever comes meanwhile.
    """

    def __init__(self) -> None:
        self._busy = False
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []
        self._served = 0.0  # seconds that the latest namespace had had when its turn began
        self._had: dict[str, float] = {}  # seconds by namespace, where more than _served

    @asynccontextmanager
    async def turn(self, namespace: str) -> AsyncIterator[None]:
        """Hold the turn; calls of one namespace get it in the order they came."""
        await self._enter(namespace)
        began = time.monotonic()
        try:
            yield
        finally:
            self._had[namespace] = self._time_of(namespace) + time.monotonic() - began
            self._next()

    def _time_of(self, namespace: str) -> float:
        return max(self._served, self._had.get(namespace, 0.0))

    async def _enter(self, namespace: str) -> None:
        if not self._busy:
            self._busy = True
            self._served = self._time_of(namespace)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((namespace, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it was given just then
                self._next()
            raise

    def _next(self) -> None:
        self._waiting = [(name, turn) for name, turn in self._waiting if not turn.done()]
        self._had = {name: had for name, had in self._had.items() if had > self._served}
        if not self._waiting:
            self._busy = False
            return
        chosen = min(self._waiting, key=lambda waiting: self._time_of(waiting[0]))
        self._waiting.remove(chosen)
        self._served = self._time_of(chosen[0])
        chosen[1].set_result(None)
