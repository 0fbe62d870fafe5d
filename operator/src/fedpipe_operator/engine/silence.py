# SPDX-License-Identifier: Apache-2.0
"""Notices agents that no longer call, and a store that is well again."""

import asyncio
import logging

from .accept import Refused
from .inbox import Inbox
from .jobs import Job, Live

log = logging.getLogger(__name__)

SILENCE_SECONDS = 60.0
"""An agent that has not called for so long is lost; agents call at least every 30 seconds."""

PAUSE_SECONDS = 10.0
"""Between two looks at the agents, and at the store."""


async def watch_silence(inbox: Inbox) -> None:
    """Lose the agents that are silent for too long, until cancelled."""
    while True:
        await asyncio.sleep(PAUSE_SECONDS)
        for uid, job in list(inbox.jobs.items()):
            try:
                await _lose_silent(inbox, uid, job)
            except Refused:
                pass  # the job was deleted meanwhile
            except Exception:
                # The trouble of one job; its status says which when the store is full.
                log.exception("job %s: silent agents could not be noted; trying again", job.state.name)


async def _lose_silent(inbox: Inbox, uid: str, job: Job) -> None:
    late = inbox.clock() - SILENCE_SECONDS
    for node in job.state.live:
        if not job.state.finished and job.live.setdefault(node, Live(inbox.clock())).seen < late:
            await inbox.mark_lost(uid, node, f"no sign of life for {SILENCE_SECONDS:.0f} s")


async def watch_store(inbox: Inbox) -> None:
    """Have the jobs that stand for want of room, or for a damaged file, go on when that has passed."""
    while True:
        await asyncio.sleep(PAUSE_SECONDS)
        full = [job for job in inbox.jobs.values() if job.full]
        has_room: bool = bool(full) and await asyncio.to_thread(inbox.blobs.has_room)
        for job in full if has_room else ():
            job.full = None
            job.committed.fire()
        for job in [job for job in inbox.jobs.values() if job.damage]:
            if await inbox.integrity.restored(job):
                job.committed.fire()
