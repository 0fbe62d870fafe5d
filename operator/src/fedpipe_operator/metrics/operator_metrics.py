# SPDX-License-Identifier: Apache-2.0
"""What the operator measures of itself, and the text of a scrape."""

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from ..engine import Engine
from ..engine.jobs import Job
from .collector import add_all_jobs, add_job
from .definitions import NAMES
from .exposition import Exposition
from .job_totals import Totals

log = logging.getLogger(__name__)

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)

SAMPLE_SECONDS = 0.5
"""Pause between two measurements of the event loop's lag."""

STORE_SECONDS = 30.0
"""Pause between two looks at the store's size."""


TURN_SECONDS = 0.005
"""A scrape gives the event loop back after so long."""


class OperatorMetrics:
    """The operator's own metrics; `requests`, `age` and `unreadable` are read at scrape time."""

    def __init__(
        self,
        engine: Engine,
        store: Path,
        requests: Callable[[], Mapping[tuple[str, str], int]],
        age: Callable[[], float],
        unreadable: Callable[[], Mapping[str, int]],
    ) -> None:
        self._engine = engine
        self._store = store
        self._requests = requests
        self._age = age
        self._unreadable = unreadable
        self._sizes = (0, 0)
        self._totals: dict[str, Totals] = {}
        self._unmeasured: set[str] = set()
        self._own = CollectorRegistry()
        self._reconcile = self._histogram("fedpipe_operator_reconcile_seconds")
        self._lag = self._histogram("fedpipe_operator_loop_lag_seconds")

    def _histogram(self, name: str) -> Histogram:
        return Histogram(name, NAMES[name].help, registry=self._own, buckets=_SECONDS)

    def observe_reconcile(self, seconds: float) -> None:
        """Count one reconciliation of a job."""
        self._reconcile.observe(seconds)

    async def watch_lag(self) -> None:
        """Measure the event loop until cancelled."""
        while True:
            due = time.monotonic() + SAMPLE_SECONDS
            await asyncio.sleep(SAMPLE_SECONDS)
            self._lag.observe(max(0.0, time.monotonic() - due))

    async def watch_store(self) -> None:
        """Look at the store's size until cancelled."""
        while True:
            self._sizes = await asyncio.to_thread(self._measure_store)
            await asyncio.sleep(STORE_SECONDS)

    def _measure_store(self) -> tuple[int, int]:
        return self._engine.blobs.size(), shutil.disk_usage(self._store).free

    def _add_job(self, samples: Exposition, uid: str, job: Job, now: float) -> None:
        """Add a job's samples, all or none; one whose figures cannot be computed must not end the scrape."""
        own = Exposition()
        try:
            add_job(own, job, self._totals.setdefault(uid, Totals()), now)
        except Exception as error:
            if uid not in self._unmeasured:
                log.exception("job %s: left out of scrapes: %s", job.state.name, type(error).__name__)
            self._unmeasured.add(uid)
        else:
            self._unmeasured.discard(uid)
            samples.extend(own)

    async def text(self) -> bytes:
        """Return a scrape."""
        samples, now = Exposition(), self._engine.clock()
        self._totals = {uid: self._totals.get(uid, Totals()) for uid in self._engine.jobs}
        self._unmeasured &= self._totals.keys()
        due = time.perf_counter() + TURN_SECONDS
        for uid, job in list(self._engine.jobs.items()):
            self._add_job(samples, uid, job, now)
            if time.perf_counter() >= due:
                await asyncio.sleep(0)
                due = time.perf_counter() + TURN_SECONDS
        add_all_jobs(samples, self._engine)
        samples.add("fedpipe_operator_unmeasured_jobs", (), len(self._unmeasured))
        for (verb, code), count in self._requests().items():
            samples.add("fedpipe_operator_api_requests_total", (verb, code), count)
        for kind, count in self._unreadable().items():
            samples.add("fedpipe_operator_unreadable_objects", (kind,), count)
        for task, count in self._engine.background.failures.items():
            samples.add("fedpipe_operator_task_failures_total", (task,), count)
        samples.add("fedpipe_operator_reconcile_age_seconds", (), self._age())
        samples.add("fedpipe_operator_store_bytes", (), self._sizes[0])
        samples.add("fedpipe_operator_store_free_bytes", (), self._sizes[1])
        return samples.text().encode() + generate_latest(self._own)
