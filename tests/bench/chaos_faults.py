# SPDX-License-Identifier: Apache-2.0
"""The faults of the chaos bench: which there are, where a process may be killed, and how it dies."""

import asyncio
import os
import signal
import threading
from dataclasses import dataclass
from typing import Any

from chaos_witness import Witness

from fedpipe_operator.engine.worker import Worker

FAULTS = (
    ("work",) * 4
    + ("all",) * 6
    + (
        "cancel",
        "crash",
        "full",
        "clock",
        "slow",
        "delete",
        "suspend",
        "edit",
        "later version",
        "older version",
        "lose",
        "damage",
    )
)
PLACES = {
    "step": 20,
    "append": 20,
    "appended": 20,
    "forget": 1,
    "forgot": 1,
    "adopt": 8,
    "adopted": 8,
    "remove": 4,
}
"""Where a process may be killed, and at the latest at which time that it is there."""


class Direct(Worker):
    """Computes in a thread: a process for each of a thousand schedules would cost more than all they do."""

    def start(self) -> None:
        """Nothing to start."""

    def stop(self) -> None:
        """Nothing to end."""

    async def run(self, namespace: str, call: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the call returns."""
        return await asyncio.to_thread(call, *args, **kwargs)


@dataclass
class Kill:
    """SIGKILL of this process: at a place for the given time, or so many seconds after it."""

    place: str
    times: int
    seconds: float

    def reach(self, place: str, witness: Witness) -> None:
        """Note that the process is at a place."""
        if place != self.place:
            return
        self.times -= 1
        if self.times == 0 and self.seconds:
            threading.Timer(self.seconds, self.now, [witness]).start()
        elif self.times == 0:
            self.now(witness)

    def now(self, witness: Witness) -> None:
        """Die."""
        witness.say("done", f"killed at {self.place}")
        os.kill(os.getpid(), signal.SIGKILL)
