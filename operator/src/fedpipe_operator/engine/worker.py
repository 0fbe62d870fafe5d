# SPDX-License-Identifier: Apache-2.0
"""One worker process for what would block the event loop: planning and aggregation."""

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from typing import ParamSpec, TypeVar

from .turns import Turns

P = ParamSpec("P")
T = TypeVar("T")


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    # A killed operator must not leave a worker that holds its memory and files.
    threading.Thread(target=wait, daemon=True, name="die-with-parent").start()


def warm() -> None:
    """Import what the calls need; the process of the event loop does without scipy."""
    from scipy import linalg, optimize, sparse, special  # noqa: F401

    from .. import aggregate, planner  # noqa: F401


START_METHOD = "spawn"
"""Of the process: a fork would keep the files and connections of the event loop open."""

RUN_SECONDS = 900.0
"""After so long a call is ended with its process: the calls of all other namespaces wait behind it."""


class Worker:
    """A process that is started again when it dies; its caller gets BrokenProcessPool and may try again."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._turns = Turns()

    def start(self) -> None:
        """Start the process and its imports, without waiting for them."""
        context = multiprocessing.get_context(START_METHOD)
        self._pool = ProcessPoolExecutor(1, context, _die_with_parent)
        # Ctrl-C of a terminal goes to all its processes; this one ends with its parent, without a traceback.
        # The tracker first: it would unblock the signal.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._pool.submit(warm)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def stop(self) -> None:
        """End the process; running work is lost."""
        if self._pool is None:
            return
        pool, self._pool = self._pool, None
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
            process.join()

    async def run(self, namespace: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what the call returns there; arguments and result are pickled.

        One call at a time, in turns of the namespaces. Raises TimeoutError for one that takes RUN_SECONDS.
        """
        async with self._turns.turn(namespace):
            if self._pool is None:
                self.start()
            assert self._pool is not None
            try:
                async with asyncio.timeout(RUN_SECONDS):
                    return await asyncio.wrap_future(self._pool.submit(call, *args, **kwargs))
            except BrokenProcessPool:
                self._pool = None
                raise
            except TimeoutError:
                await asyncio.to_thread(self.stop)
                name = getattr(call, "__name__", "a call")
                raise TimeoutError(f"{name} took more than {RUN_SECONDS:.0f} s") from None
