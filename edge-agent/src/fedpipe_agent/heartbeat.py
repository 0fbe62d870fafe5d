# SPDX-License-Identifier: Apache-2.0
"""Signs of life while an assignment is worked on, and the news that it is no longer wanted."""

import threading
import time
from types import TracebackType
from typing import Any, Self

from fedpipe_api import wire

from .errors import Aborted, describe
from .transport import Transport

PERIOD = 2.0
"""Seconds between two signs of life; a change of state is sent at once."""


class Work:
    """One assignment in progress, or the start of the agent.

    Posts Progress from a thread of its own until the `with` block ends.
    """

    def __init__(
        self, transport: Transport, kind: wire.AssignmentKind, round_number: int, state: str = "loading"
    ):
        self._transport = transport
        self._progress = wire.Progress(kind=kind, round=round_number, state=state)
        self._changed = threading.Condition()
        self._ended = False
        self._wanted = True
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        # A sign of life on its way must not arrive after the word that the agent failed.
        self._thread.join(timeout=1)

    def report(self, **fields: Any) -> None:
        """Replace fields of the next Progress; a new `state` is sent at once."""
        with self._changed:
            before = self._progress.state
            self._progress = self._progress.model_copy(update=fields)
            if self._progress.state != before:
                self._changed.notify()

    def check(self) -> None:
        """Raise Aborted once the coordinator has said that the work is not wanted."""
        if not self._wanted:
            raise Aborted

    def _run(self) -> None:
        while not self._ended:
            sent = self._progress
            answer = self._transport.progress(sent)
            self._wanted = self._wanted and (answer is None or answer.wanted)
            deadline = time.monotonic() + PERIOD
            with self._changed:
                while not self._ended and self._progress.state == sent.state:
                    left = deadline - time.monotonic()
                    if left <= 0 or not self._changed.wait(left):
                        break


def report_failure(transport: Transport, error: BaseException, current: wire.Assignment | None) -> None:
    """Report in one line why the agent ends; a few attempts, because it ends either way."""
    progress = wire.Progress(
        kind=current.kind if current else wire.AssignmentKind.PROFILE,
        round=current.round if current else 0,
        state="failed",
        message=describe(error)[:1024],
    )
    for _ in range(3):
        if transport.progress(progress) is not None:
            return
        time.sleep(0.3)
