# SPDX-License-Identifier: Apache-2.0
"""A job in memory: its state, who waits for it, and what dies with the process."""

import asyncio
import contextlib
from dataclasses import dataclass, field

from fedpipe_api.conditions import Reason
from fedpipe_api.wire import Progress

from .allowances import Allowance, Edits, Registrations
from .decide import Wait
from .state import JobState


@dataclass
class Live:
    """What is known of an agent only while this process lives."""

    seen: float
    progress: Progress | None = None


class Signal:
    """Wakes all who wait for its next firing."""

    def __init__(self) -> None:
        self.next = asyncio.Event()

    def fire(self) -> None:
        """Wake the waiters of now; later ones wait for the next time."""
        fired, self.next = self.next, asyncio.Event()
        fired.set()


@dataclass
class Job:
    """One job in memory. `lock` is held from a check of the state to the commit that depends on it."""

    state: JobState
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    committed: Signal = field(default_factory=Signal)  # the state changed: the driver looks again
    work_available: Signal = field(default_factory=Signal)  # agents may have new work
    shown: Signal = field(default_factory=Signal)  # there is something new to show
    live: dict[str, Live] = field(default_factory=dict)
    wait: Wait | None = None
    full: str | None = None  # what could not be written for want of room, until there is some
    refused: dict[str, str] = field(default_factory=dict)
    """Why each node's update found no room, until one of its is let in or the round closes."""
    damage: str | None = None  # which file of the store is damaged, and what to do
    bytes_down: int = 0
    uploads: dict[str, int] = field(default_factory=dict)
    """Bytes of the update that each node is sending now."""
    returns: Allowance = field(default_factory=Allowance)
    edits: Edits = field(default_factory=Edits)
    registrations: Registrations = field(default_factory=Registrations)
    task: asyncio.Task[None] | None = None

    def set_waiting(self, wait: Wait) -> None:
        """Show why nothing happens."""
        if self.wait != wait:
            self.wait = wait
            self.shown.fire()

    def set_store_full(self, what: str) -> None:
        """Show that the store has no room; the job goes on by itself once it has."""
        self.full = f"the operator's store has no room for {what}; it is tried again"
        self.set_waiting(Wait(Reason.STORE_FULL, self.full))


async def until(event: asyncio.Event, seconds: float | None) -> None:
    """Wait for the event, for at most the given seconds; None: as long as it takes."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
