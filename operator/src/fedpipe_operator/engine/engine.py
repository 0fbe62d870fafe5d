# SPDX-License-Identifier: Apache-2.0
"""The engine as a whole: its life, and what the runner of the fleet says."""

import asyncio
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from fedpipe_api.job import FedPipeJob, FedPipeJobSpec

from .background import Background, cancel, uninterrupted
from .backup import serve_backups
from .driver import Driver
from .events import JobEvent
from .inbox import Inbox
from .integrity import Integrity
from .jobs import Job, Live, until
from .journal import Journal
from .records import Offered, SpecChanged, Submitted
from .silence import watch_silence, watch_store
from .worker import Worker


class Engine(Inbox):
    """All jobs of one store. Call from one event loop; nothing here blocks it."""

    def __init__(
        self,
        directory: Path,
        *,
        clock: Callable[[], float] = time.time,
        notify: Callable[[str, JobEvent], None] = lambda uid, event: None,
        reads_paths: bool = False,
    ) -> None:
        """Open a store; `reads_paths` lets jobs start from adapters in directories of this machine."""
        self._directory = directory
        self._worker = Worker()
        journal = Journal(directory, clock=clock, notify=notify)
        super().__init__(journal, Integrity(journal, self._worker))
        self._driver = Driver(journal, self._worker, self.integrity, reads_paths=reads_paths)
        self.background = Background()

    # Life

    async def start(self) -> None:
        """Take up every job of the ledger where it stopped."""
        await self._journal.replay()
        self._worker.start()
        for job in self.jobs.values():
            self._run(job)
        self.background.start("silence", partial(watch_silence, self))
        self.background.start("backups", partial(serve_backups, self._journal, self._directory))
        self.background.start("store", partial(watch_store, self))

    async def namespaces(self) -> dict[str, str]:
        """Return the namespace of every job of the store by uid, before the start as well."""
        return await self._journal.namespaces()

    async def stop(self) -> None:
        """Stop driving; everything that matters is in the store already."""
        await self.background.stop()
        await cancel(job.task for job in self.jobs.values())
        await asyncio.to_thread(self._worker.stop)
        self._journal.close()

    def _run(self, job: Job) -> None:
        now = self.clock()
        # An agent that was there before a restart gets the full time to call again.
        job.live = {node: Live(now) for node in job.state.agents}
        job.task = self.background.tend("drive", job.state.name, partial(self._driver.drive, job))

    # What the runner of the fleet says: kube/ or local/

    async def submit(self, job: FedPipeJob) -> bool:
        """Take a job in by its metadata.uid, or its edited spec if its generation is new. Idempotent.

        Return False where the job was edited too often: it goes on as it was, and the edit must come again.
        """
        meta = job.metadata
        if meta.uid is None:
            raise ValueError("a job needs a uid")
        generation = meta.generation or 1
        known = self.jobs.get(meta.uid)
        if meta.uid in self.quarantined:
            return True
        if known is None:
            record = Submitted(namespace=meta.namespace, name=meta.name, generation=generation, spec=job.spec)
            await uninterrupted(self._take_in(meta.uid, record))
            return True
        async with known.lock:
            # A spec that differs within its generation was written by nobody: another version of the operator
            # has other defaults. The job keeps those that it began with.
            if generation <= known.state.generation or known.state.finished:
                return True
            if not known.edits.take(meta.uid):
                return False
            await self._journal.commit(known, SpecChanged(generation=generation, spec=job.spec))
            return True

    async def _take_in(self, uid: str, record: Submitted) -> None:
        opened = await self._journal.open(uid, record)
        if opened.task is None:
            self._run(opened)

    async def change(self, uid: str, spec: FedPipeJobSpec) -> None:
        """Change a job's spec where no API server counts its generations (the local run)."""
        job = self.jobs[uid]
        async with job.lock:
            if job.state.spec != spec:
                await self._journal.commit(job, SpecChanged(generation=job.state.generation + 1, spec=spec))

    async def set_eligible_nodes(
        self, uid: str, nodes: Iterable[str], excluded: dict[str, str] | None = None
    ) -> None:
        """Say which nodes may take part, and why others may not. Idempotent."""
        job, names = self.job(uid), tuple(sorted(nodes))
        async with job.lock:
            state = job.state
            if (names, excluded or {}) != (state.offered, state.excluded) and not state.finished:
                record = Offered(sequence=state.sequence + 1, nodes=names, excluded=excluded or {})
                await self._journal.commit(job, record)

    async def delete(self, uid: str) -> None:
        """Forget a job: its records and blobs. Idempotent."""
        await uninterrupted(self._delete(uid))

    async def _delete(self, uid: str) -> None:
        job = await self._journal.forget(uid)
        if job is None:
            return
        await cancel([job.task])
        job.work_available.fire()
        job.shown.fire()

    async def moved(self, uid: str, seconds: float) -> None:
        """Return when the job changed, or after the given seconds."""
        await until(self.jobs[uid].shown.next, seconds)
