# SPDX-License-Identifier: Apache-2.0
"""What the engine writes: every change of a job is one durable record, then a change of its state."""

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

from ..store import Blobs, Entry, Ledger, is_full
from ..store.backup import snapshot
from .accept import Refused
from .background import uninterrupted
from .events import Before, JobEvent, event_of
from .jobs import Job
from .order import check
from .quarantine import Quarantine, UnreadableError, check_usable, digests_named, fold, names_in, parse
from .readers import Readers
from .records import AgentLost, Record, RoundClosed, Submitted
from .state import JobState, apply, blobs_in_use, submitted

log = logging.getLogger(__name__)
T = TypeVar("T")

# Records read from the ledger at a time; the largest have some megabytes.
_AT_ONCE = 16

# After these records an agent may have new work.
_TURNS = ("spec", "offered", "plan", "opened", "dropped", "aggregated", "finished")


class Journal:
    """The jobs of one store and the ledger behind them. Call from one event loop; nothing here blocks it."""

    def __init__(
        self,
        directory: Path,
        *,
        clock: Callable[[], float] = time.time,
        notify: Callable[[str, JobEvent], None] = lambda uid, event: None,
    ) -> None:
        self.jobs: dict[str, Job] = {}
        self.quarantined: dict[str, Quarantine] = {}
        self._set_aside: dict[str, set[str]] = {}
        self.clock = clock
        self._notify = notify
        self._ledger = Ledger(directory / "ledger.sqlite")
        self.blobs = Blobs(directory / "blobs")
        self.readers = Readers()
        self._threads = ThreadPoolExecutor(1, "ledger")
        # Held while a blob and the record that names it are written, and while unused blobs are removed.
        self.store_lock = asyncio.Lock()

    async def replay(self) -> None:
        """Read every job of the ledger, and remove the blobs that none needs.

        A job with a record that cannot be read, placed or worked with is quarantined: its records and blobs
        stay as they are until it is deleted, and the others run.
        """
        states: dict[str, JobState] = {}
        last: dict[str, str] = {}
        async for entry in self._entries():
            if entry.job in self.quarantined:
                continue
            last[entry.job] = entry.key
            try:
                states[entry.job] = fold(states.get(entry.job), entry.job, entry)
            except UnreadableError as error:
                state = states.pop(entry.job, None)
                names = (state.namespace, state.name) if state else names_in(entry.body)
                self._quarantine(entry.job, names, entry.key, error)
        for uid, state in states.items():
            try:
                check_usable(state, self.clock())
                self.jobs[uid] = Job(state)
            except UnreadableError as error:
                self._quarantine(uid, (state.namespace, state.name), last[uid], error)
        await self._set_blobs_aside()
        await self._remove_unused()

    async def _entries(self) -> AsyncIterator[Entry]:
        """Yield every record of the ledger, a few of them in memory at a time."""
        entries = self._ledger.replay()
        while some := await self._in_ledger(lambda: list(islice(entries, _AT_ONCE))):
            for entry in some:
                yield entry

    async def _set_blobs_aside(self) -> None:
        """Note what the records of quarantined jobs may name, those before the damaged one as well."""
        self._set_aside = {uid: set() for uid in self.quarantined}
        if self.quarantined:
            async for entry in self._entries():
                if entry.job in self.quarantined:
                    self._set_aside[entry.job] |= digests_named(entry.body)

    async def namespaces(self) -> dict[str, str]:
        """Return the namespace of every job of the ledger by uid, empty where it cannot be read."""
        found = await self._in_ledger(self._ledger.submitted)
        return {uid: names_in(body)[0] for uid, body in found}

    def _quarantine(self, uid: str, names: tuple[str, str], key: str, error: UnreadableError) -> None:
        found = Quarantine(*names, key, str(error)[:512])
        log.error("job %s/%s (%s) is quarantined: record %.80r: %s", *names, uid, key, error)
        self.quarantined[uid] = found

    async def _remove_unused(self) -> None:
        # The digest of a blob may be what was damaged in a record, so nothing goes while a job is set aside.
        if not self.quarantined:
            await asyncio.to_thread(self.blobs.keep_only, self._in_use())

    def close(self) -> None:
        """Close the store; everything that matters is in it already."""
        self._threads.shutdown()
        self._ledger.close()

    async def open(self, uid: str, record: Submitted) -> Job:
        """Commit a job's first record and return the job. Not to be cancelled."""
        async with self.store_lock:
            if uid in self.jobs:
                return self.jobs[uid]
            entry = self._entry(uid, record)
            await self._in_ledger(partial(self._ledger.append, entry))
            job = self.jobs[uid] = Job(submitted(uid, record, entry.at))
        return job

    async def commit(self, job: Job, record: Record) -> None:
        """Make a record durable, apply it and wake who waits; the caller holds the job's lock.

        Nothing is written that could not be read again. Raises Refused with 404 when the job is gone.
        """
        uid = job.state.uid
        if self.jobs.get(uid) is not job:
            raise gone()
        check(job.state, record)
        entry = self._entry(uid, record)
        # Once the record is being written the state must follow, though nobody may wait for it any more.
        await uninterrupted(self._commit(job, record, entry))

    async def _commit(self, job: Job, record: Record, entry: Entry) -> None:
        try:
            await self._in_ledger(partial(self._ledger.append, entry))
        except (OSError, sqlite3.Error) as error:
            if is_full(error):
                job.set_store_full("a record")
            raise
        self._apply(job, record, entry.at)

    def _entry(self, uid: str, record: Record) -> Entry:
        at, body = self.clock(), record.to_json()
        try:
            parse(body, record.key, at)
        except UnreadableError as error:
            raise Refused(422, "Invalid", f"a record of kind {record.kind} cannot be kept: {error}") from None
        return Entry(uid, record.key, at, body)

    def _apply(self, job: Job, record: Record, at: float) -> None:
        before = Before.of(job.state)
        apply(job.state, record, at)
        job.wait = job.full = None
        _forget_refusals(job, record)
        event = event_of(job.state, record, before)
        if event:
            self._notify(job.state.uid, event)
        job.committed.fire()
        job.shown.fire()
        if record.kind in _TURNS:
            job.work_available.fire()

    async def forget(self, uid: str) -> Job | None:
        """Remove a job, its records, and the blobs that no other job uses; return it if it ran.

        It waits for what is being committed; what waits behind it finds the job gone. Not to be cancelled.
        """
        job = self.jobs.get(uid)
        if job is not None:
            async with job.lock, self.store_lock:
                if self.jobs.get(uid) is not job:
                    return None
                # First the records: a job that cannot be removed goes on.
                await self._in_ledger(partial(self._ledger.forget, uid))
                del self.jobs[uid]
                await self.remove(blobs_in_use(job.state))
        elif uid in self.quarantined:
            async with self.store_lock:
                await self._in_ledger(partial(self._ledger.forget, uid))
                self.quarantined.pop(uid, None)
                await self.remove(self._set_aside.pop(uid, set()))
                await self._remove_unused()
        return job

    @contextlib.asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Path]:
        """Yield a directory with the ledger and the blobs of one moment, removed at the end."""
        taken = snapshot(self._ledger, self.blobs)
        async with self.store_lock:
            directory = await self._in_ledger(taken.__enter__)
        try:
            yield directory
        finally:
            await asyncio.to_thread(taken.__exit__, None, None, None)

    async def remove(self, digests: set[str]) -> None:
        """Remove those blobs that no job uses any more; the caller holds the store lock."""
        for digest in digests - self._in_use():
            try:
                await asyncio.to_thread(self.blobs.remove, digest)
                self.readers.cut_off(digest)
            except OSError as error:
                log.warning("blob %s: cannot be removed (%s); the next start tries again", digest, error)

    def _in_use(self) -> set[str]:
        used = {digest for job in self.jobs.values() for digest in blobs_in_use(job.state)}
        return used.union(*self._set_aside.values())

    async def _in_ledger(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


def _forget_refusals(job: Job, record: Record) -> None:
    """Forget the updates that found no room and are not sent again."""
    match record:
        case RoundClosed():
            job.refused.clear()
        case AgentLost():
            job.refused.pop(record.node, None)


def gone() -> Refused:
    """Return what is said of a job that is not in the ledger (any more)."""
    return Refused(404, "JobUnknown", "the job is gone")
