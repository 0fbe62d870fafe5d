# SPDX-License-Identifier: Apache-2.0
"""Work that goes on in the background for as long as the process: it survives its errors and is counted."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0
"""Seconds between a failure and the next start; they double with each failure in a row."""

STEADY_SECONDS = 120.0
"""Work that ran for so long has recovered from the failures before."""

LASTING = 5
"""Failures in a row after which the work counts as dead, though it is still tried again."""


@dataclass
class _State:
    task: asyncio.Task[None] | None = None
    failures: int = 0
    started: float = 0.0


class Background:
    """The background tasks of a process. `failures` counts them by kind of work since the start."""

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()
        self._states: dict[str, _State] = {}

    def start(self, kind: str, work: Callable[[], Awaitable[None]]) -> None:
        """Begin work that every job depends on; `dead` names it when it fails lastingly."""
        state = self._states.setdefault(kind, _State())
        self.failures[kind] += 0
        state.task = asyncio.create_task(self._keep(kind, work, state, kind), name=kind)

    def tend(self, kind: str, name: str, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Begin work for one job, which ends when it returns or is cancelled; the caller keeps the task."""
        self.failures[kind] += 0
        title = f"{kind} {name}"
        return asyncio.create_task(self._keep(kind, work, _State(), title), name=title)

    def dead(self) -> list[str]:
        """Return the kinds of work that failed again and again and have not recovered, in order of name."""
        now = time.monotonic()
        return sorted(
            kind
            for kind, state in self._states.items()
            if state.failures >= LASTING and now - state.started < STEADY_SECONDS
        )

    async def stop(self) -> None:
        """Cancel what `start` began and wait for it."""
        await cancel(state.task for state in self._states.values())
        self._states.clear()

    async def _keep(self, kind: str, work: Callable[[], Awaitable[None]], state: _State, title: str) -> None:
        while True:
            state.started = time.monotonic()
            try:
                await work()
                return
            except Exception as error:
                if time.monotonic() - state.started >= STEADY_SECONDS:
                    state.failures = 0
                state.failures += 1
                self.failures[kind] += 1
                pause = min(FIRST_PAUSE * 2 ** min(state.failures - 1, 10), LONGEST_PAUSE)
                log.exception("%s failed (%s); it is started again in %.0f s", title, error, pause)
            await asyncio.sleep(pause)


async def cancel(tasks: Iterable[asyncio.Task[None] | None]) -> None:
    """Cancel tasks and wait until they have ended."""
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Return what the work returns; a cancellation, however often it comes, waits until it has ended."""
    task, cancelled = asyncio.create_task(work), None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return task.result()
    if not task.cancelled() and (failed := task.exception()) is not None:
        log.warning("what a cancelled call had begun failed: %s", failed)
    raise cancelled
