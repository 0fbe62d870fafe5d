# SPDX-License-Identifier: Apache-2.0
"""Brings each finished adapter to its job's spec.output, once, however often that fails first."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from fedpipe_api.base import UserError
from fedpipe_api.conditions import Reason
from fedpipe_api.job import FedPipeJob
from fedpipe_api.status import Phase

from ..engine import Engine, JobEvent
from ..engine.state import JobState
from .api import ApiError
from .events import EventRecorder
from .job_status import OutputResult
from .tracked_job import TrackedJob

FIRST_PAUSE, LONGEST_PAUSE = 5.0, 600.0
"""Seconds before a failed delivery is tried again: twice as long each time."""


class OutputDelivery:
    """Deliveries in the background; `write` delivers an adapter and returns where it is stored."""

    def __init__(
        self,
        engine: Engine,
        events: EventRecorder,
        write: Callable[[FedPipeJob, JobState], Awaitable[str]],
    ) -> None:
        self._engine = engine
        self._events = events
        self._write = write

    def deliver(self, known: TrackedJob, job: FedPipeJob) -> None:
        """Start the delivery if the job has finished and wants one; one that is under way goes on."""
        engine_job = self._engine.jobs.get(known.uid)
        state = engine_job.state if engine_job else None
        if job.spec.output is None or state is None or known.output_task is not None:
            return
        done = known.output is not None and known.output.written
        if not done and state.finished and state.finished.phase is Phase.SUCCEEDED and state.adapter:
            deliver = partial(self._deliver_until_done, known, job, state)
            known.output_task = self._engine.background.tend("deliver", known.title, deliver)

    async def _deliver_until_done(self, known: TrackedJob, job: FedPipeJob, state: JobState) -> None:
        pause = FIRST_PAUSE
        while True:
            try:
                where = await self._write(job, state)
            except (UserError, ApiError) as error:
                self._record(known, OutputResult(False, str(error)[:1024]))
            else:
                self._record(known, OutputResult(True, where))
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _record(self, known: TrackedJob, result: OutputResult) -> None:
        known.output = result
        reason = Reason.OUTPUT_WRITTEN if result.written else Reason.OUTPUT_FAILED
        event = JobEvent(not result.written, reason, result.message)
        self._events.record(known.namespace, known.name, known.uid, event)
        known.changed.set()
