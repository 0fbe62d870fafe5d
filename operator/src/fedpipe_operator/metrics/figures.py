"""What the operator measures of itself, and the text of a scrape."""

import asyncio
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from ..engine import Engine
from .collector import Samples, add_job, add_phases
from .table import NAMES

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)

SAMPLE_SECONDS = 0.5
"""Pause between two measurements of the event loop's lag."""

STORE_SECONDS = 30.0
"""Pause between two looks at the store's size."""


class _Fixed(Collector):
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return iter(self._metrics)


class Figures:
    """The operator's own metrics; `requests` and `age` are read at scrape time."""

    def __init__(
        self,
        engine: Engine,
        store: Path,
        requests: Callable[[], Mapping[tuple[str, str], int]],
        age: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._store = store
        self._requests = requests
        self._age = age
        self._sizes = (0, 0)
        self._own = CollectorRegistry()
        self._reconcile = self._histogram("fedpipe_operator_reconcile_seconds")
        self._lag = self._histogram("fedpipe_operator_loop_lag_seconds")

    def _histogram(self, name: str) -> Histogram:
        return Histogram(name, NAMES[name].help, registry=self._own, buckets=_SECONDS)

    def observe_reconcile(self, seconds: float) -> None:
        """Count one look at a job."""
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

    async def text(self) -> bytes:
        """Return a scrape; the event loop is given back after every job."""
        samples, now = Samples(), self._engine.clock()
        for job in list(self._engine.jobs.values()):
            add_job(samples, job, now)
            await asyncio.sleep(0)
        add_phases(samples, self._engine)
        for (verb, code), count in self._requests().items():
            samples.add("fedpipe_operator_api_requests_total", (verb, code), count)
        samples.add("fedpipe_operator_reconcile_age_seconds", (), self._age())
        samples.add("fedpipe_operator_store_bytes", (), self._sizes[0])
        samples.add("fedpipe_operator_store_free_bytes", (), self._sizes[1])
        registry = CollectorRegistry()
        registry.register(_Fixed([*self._own.collect(), *samples.families()]))
        return await asyncio.to_thread(generate_latest, registry)
