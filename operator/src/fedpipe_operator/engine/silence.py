"""Notices agents that no longer call."""

import asyncio
import contextlib

from .inbox import Inbox
from .jobs import Live

SILENCE_SECONDS = 60.0
"""An agent that has not called for so long is lost; agents call at least every 30 seconds."""


async def watch_silence(inbox: Inbox) -> None:
    """Lose the agents that are silent for too long, until cancelled."""
    while True:
        await asyncio.sleep(SILENCE_SECONDS / 6)
        for uid, job in list(inbox.jobs.items()):
            late = inbox.clock() - SILENCE_SECONDS
            for node in job.state.live:
                if not job.state.finished and job.live.setdefault(node, Live(inbox.clock())).seen < late:
                    text = f"no sign of life for {SILENCE_SECONDS:.0f} s"
                    with contextlib.suppress(KeyError):
                        await inbox.lose(uid, node, text)
