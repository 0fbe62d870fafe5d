# SPDX-License-Identifier: Apache-2.0
"""Whether the files of a job are what they were: checked before they are read, made again where possible."""

import asyncio

from ..aggregate import make_again
from .jobs import Job
from .journal import Journal
from .state import JobState, blobs_in_use
from .worker import Worker


class Integrity:
    """Checks the digests of blobs. A damaged one is never used; `Job.damage` says what to do about it."""

    def __init__(self, journal: Journal, worker: Worker) -> None:
        self._journal = journal
        self._worker = worker
        self._turn = asyncio.Lock()

    async def is_intact(self, digest: str) -> bool:
        """Whether a blob's bytes are those of its name now."""
        return await asyncio.to_thread(self._journal.blobs.intact, digest)

    async def holds(self, job: Job, digest: str) -> bool:
        """Whether a blob may be sent or used: its bytes are right, or could be made again."""
        # One at a time: a thousand nodes ask for the same file at once.
        async with self._turn:
            if await self.is_intact(digest) or await self._make_again(job, digest):
                return True
        if digest not in blobs_in_use(job.state):
            return False  # the job went on while the caller waited for its turn
        job.damage = (
            f"file {digest[:12]} of the global adapter is damaged or missing in the store; "
            "restore a backup, or delete the job and start it again"
        )
        job.committed.fire()
        return False

    async def start_holds(self, job: Job) -> bool:
        """Whether what the closed round's updates started from, and the optimizer's state, can be read."""
        return all([await self.holds(job, digest) for digest in _start(job.state)])

    async def restored(self, job: Job) -> bool:
        """Whether all that the job needs is intact again after damage; then it is no longer said."""
        job.damage = None
        return await self.start_holds(job)

    async def _make_again(self, job: Job, digest: str) -> bool:
        """Make what nodes download again from the adapter it was made of; return whether that worked."""
        results = (known.result for known in job.state.rounds.values() if known.result)
        found = next((r for r in results if r.sent is not None and r.sent.digest == digest), None)
        if found is None or found.sent is None or not await self.is_intact(found.adapter.digest):
            return False
        blobs = self._journal.blobs
        adapter = blobs.path(found.adapter.digest)
        made = await self._worker.run(
            job.state.namespace, make_again, adapter, found.sent.size, blobs.temporary
        )
        try:
            if made.digest != digest:
                return False
            async with self._journal.store_lock:
                await asyncio.to_thread(blobs.adopt, made.path, digest)
            return True
        finally:
            await asyncio.to_thread(made.path.unlink, missing_ok=True)


def _start(state: JobState) -> list[str]:
    """Return the digests of what the next aggregation and the nodes start from."""
    known = state.rounds.get(state.done)
    result = known.result if known else None
    files = (result.adapter, result.server_state, result.sent) if result else (state.given,)
    return [file.digest for file in files if file]
