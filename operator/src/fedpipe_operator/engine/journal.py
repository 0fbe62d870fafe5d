"""What the engine writes: every change of a job is one durable record, then a change of its state."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from ..store import Blobs, Entry, Ledger
from .jobs import Job
from .notes import Note, note_of
from .records import ADAPTER, Record, Submitted
from .state import apply, blobs_in_use, submitted

T = TypeVar("T")

# After these records an agent may have new work.
_TURNS = ("spec", "offered", "plan", "opened", "aggregated", "finished")


class Journal:
    """The jobs of one store and the ledger behind them. Call from one event loop; nothing here blocks it."""

    def __init__(
        self,
        directory: Path,
        *,
        clock: Callable[[], float] = time.time,
        notify: Callable[[str, Note], None] = lambda uid, note: None,
    ) -> None:
        self.jobs: dict[str, Job] = {}
        self.clock = clock
        self._notify = notify
        self._ledger = Ledger(directory / "ledger.sqlite")
        self.blobs = Blobs(directory / "blobs")
        self._threads = ThreadPoolExecutor(1, "ledger")
        # Held while a blob and the record that names it come to be, and while unused blobs are removed.
        self.store_lock = asyncio.Lock()

    async def replay(self) -> None:
        """Read every job of the ledger, and remove the blobs that none needs."""
        for entry in await self._in_ledger(lambda: list(self._ledger.replay())):
            record = ADAPTER.validate_json(entry.body)
            if isinstance(record, Submitted):
                self.jobs[entry.job] = Job(submitted(entry.job, record, entry.at))
            else:
                apply(self.jobs[entry.job].state, record, entry.at)
        await asyncio.to_thread(self.blobs.keep_only, self._in_use())

    def close(self) -> None:
        """Close the store; everything that matters is in it already."""
        self._threads.shutdown()
        self._ledger.close()

    async def open(self, uid: str, record: Submitted) -> Job:
        """Commit a job's first record and return the job."""
        entry = Entry(uid, record.key, self.clock(), record.to_json())
        await self._in_ledger(partial(self._ledger.append, entry))
        self.jobs[uid] = Job(submitted(uid, record, entry.at))
        return self.jobs[uid]

    async def commit(self, job: Job, record: Record) -> None:
        """Make a record durable, apply it and wake who waits; the caller holds the job's lock."""
        at = self.clock()
        entry = Entry(job.state.uid, record.key, at, record.to_json())
        await self._in_ledger(partial(self._ledger.append, entry))
        apply(job.state, record, at)
        job.wait = None
        note = note_of(job.state, record)
        if note:
            self._notify(job.state.uid, note)
        job.committed.fire()
        job.shown.fire()
        if record.kind in _TURNS:
            job.turned.fire()

    async def forget(self, job: Job) -> None:
        """Remove a job's records, and the blobs that no other job uses."""
        async with self.store_lock:
            await self._in_ledger(partial(self._ledger.forget, job.state.uid))
            await self.remove(blobs_in_use(job.state))

    async def remove(self, digests: set[str]) -> None:
        """Remove those blobs that no job uses any more; the caller holds the store lock."""
        for digest in digests - self._in_use():
            await asyncio.to_thread(self.blobs.remove, digest)

    def _in_use(self) -> set[str]:
        return {digest for job in self.jobs.values() for digest in blobs_in_use(job.state)}

    async def _in_ledger(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)
