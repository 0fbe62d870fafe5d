# SPDX-License-Identifier: Apache-2.0
"""The probe's loop: pass after pass, writing what moved. Every trouble is a state; none ends the loop."""

import logging
import random
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from fedpipe_api.node import Capacity, FedPipeNodeStatus, PrecisionSupport

from ..errors import Stopped
from . import host, link, status
from .child import Child, Wait
from .metrics import NodeMetrics
from .missed_passes import Reader
from .publish import Publisher, PublishError
from .waiting import Waiter

LINK_INTERVAL = 3600.0
"""Seconds between two measurements of the link; each moves up to link.SAMPLE_BYTES."""

LINK_RETRY, LONGEST_LINK_RETRY = 15.0, 300.0
"""Seconds after one that failed, doubled each time: the coordinator may have started after the probe."""

JITTER = 0.1
"""Share by which intervals vary, so that the probes of a fleet do not keep step."""

log = logging.getLogger("fedpipe.probe")


@dataclass
class Probe:
    """Looks at one node. `timeout` is NVML's, in seconds; the rest as in `host.read` and `status.build`."""

    timeout: float
    cache: Path | None = None
    capacity: Capacity | None = None
    limited: bool = False
    root: Path = Path("/")
    reader: Reader = field(init=False)

    def __post_init__(self) -> None:
        self.reader = Reader(self.timeout, self.root)

    def look(
        self,
        *,
        wait: Wait | None = None,
        verified: tuple[PrecisionSupport, ...] = (),
        link_rate: int | None = None,
        before: FedPipeNodeStatus | None = None,
    ) -> FedPipeNodeStatus:
        """Make one pass: init, read, shutdown."""
        reading = None if self.capacity else self.reader.read(wait)
        return status.build(
            reading,
            host.read(self.cache, limited=self.limited, root=self.root),
            now=datetime.now(UTC).replace(microsecond=0),
            capacity=self.capacity,
            verified=verified,
            link_rate=link_rate,
            before=before,
        )


@dataclass(frozen=True)
class Coordinator:
    """What to download to measure the link; `ca` as in `link.measure`."""

    url: str
    ca: Path | None = None


class Link:
    """The link's rate, measured now and then; `known` is what an earlier probe measured."""

    def __init__(self, coordinator: Coordinator | None, known: int | None = None) -> None:
        self._coordinator = coordinator
        self._child = Child(link.DEADLINE)
        self._due = 0.0
        self._retry = LINK_RETRY
        self._trouble = ""
        self.rate = known if coordinator else None

    def look(self, waiter: Waiter | None = None) -> int | None:
        """Return the rate in bytes per second, measured again when that is due; None when it is not known."""
        if self._coordinator is None or time.monotonic() < self._due:
            return self.rate
        try:
            self.rate = link.measure(
                self._coordinator.url,
                self._coordinator.ca,
                wait=waiter.readable if waiter else None,
                child=self._child,
            )
        except link.LinkError as error:
            if waiter and waiter.stopping:
                # Interrupted by the signal: not a fault of the link, so it is not reported.
                return self.rate
            self.rate = None
            self._report(str(error))
        else:
            self._report("")
        if self.rate is not None:
            pause, self._retry = LINK_INTERVAL, LINK_RETRY
        else:
            pause, self._retry = self._retry, min(2 * self._retry, LONGEST_LINK_RETRY)
        self._due = time.monotonic() + _vary(pause)
        return self.rate

    def _report(self, trouble: str) -> None:
        """Log a trouble once, and its end."""
        if trouble != self._trouble:
            self._trouble = trouble
            said = f"cannot be measured: {trouble}" if trouble else "is measured"
            log.info("the link to %s %s", self._coordinator.url if self._coordinator else "", said)


class Schedule:
    """When to write: on a move past a threshold, at the heartbeat, and less and less often while writes fail.

    `interval` and `heartbeat` are in seconds, as is every `now`, which is monotonic time. The heartbeat
    counts from the last write, so a quiet node writes once per heartbeat and never more often.
    """

    def __init__(self, interval: float, heartbeat: float) -> None:
        self._interval = interval
        self._heartbeat = heartbeat
        self._written: FedPipeNodeStatus | None = None
        self._beat_due = 0.0
        self._failures = 0
        self._blocked_until = 0.0

    def cause(self, current: FedPipeNodeStatus, now: float) -> str | None:
        """Return why to write now, or None."""
        if now < self._blocked_until:
            return None
        if self._written is None:
            return "first"
        return status.moved(self._written, current) or ("heartbeat" if now >= self._beat_due else None)

    def wrote(self, current: FedPipeNodeStatus, now: float) -> None:
        """Take note of a write."""
        self._written = current
        self._failures = 0
        self._beat_due = now + self._heartbeat

    def failed(self, now: float) -> None:
        """Take note of a failure: wait twice as long as last time, at most a heartbeat."""
        delay = min(self._interval * 2 ** min(self._failures, 16), self._heartbeat)
        self._failures += 1
        self._blocked_until = now + _vary(delay)


def run(
    probe: Probe,
    publisher: Publisher,
    waiter: Waiter,
    metrics: NodeMetrics,
    *,
    interval: float,
    heartbeat: float,
    coordinator: Coordinator | None = None,
) -> None:
    """Make passes every `interval` seconds until SIGTERM; report at least about every `heartbeat` seconds."""
    schedule = Schedule(interval, heartbeat)
    journal = StateLog()
    try:
        with waiter.interruptible():
            before = _last_status(publisher)
        measured = Link(coordinator, before.link_rate if before and before.source != "declared" else None)
        while not waiter.stopping:
            started = time.monotonic()
            before = probe.look(
                wait=waiter.readable, verified=publisher.verified, link_rate=measured.rate, before=before
            )
            if waiter.stopping:
                # A read interrupted by the signal is not a fault of NVML, so it is not reported.
                return
            metrics.saw(before, time.monotonic() - started)
            journal.saw(before)
            cause = schedule.cause(before, time.monotonic())
            if cause:
                try:
                    with waiter.interruptible():
                        publisher.write(before)
                except PublishError as error:
                    schedule.failed(time.monotonic())
                    metrics.failed(error.reason)
                    journal.failed(error)
                else:
                    schedule.wrote(before, time.monotonic())
                    metrics.wrote(cause)
                    journal.wrote()
            # After the write, so that a coordinator which keeps it waiting delays no first report.
            measured.look(waiter)
            waiter.sleep(_vary(interval) - (time.monotonic() - started))
    except Stopped:
        # It came while the API server was silent.
        return


class StateLog:
    """Logs each state once, when it changes."""

    def __init__(self) -> None:
        self._states: dict[str, tuple[str, str]] = {}
        self._trouble: str | None = None

    def saw(self, current: FedPipeNodeStatus) -> None:
        """Log the conditions that changed."""
        for condition in current.conditions:
            state = (condition.status, condition.reason)
            if self._states.get(condition.type) != state:
                self._states[condition.type] = state
                log.info("%s is %s (%s) %s", condition.type, *state, condition.message)

    def failed(self, error: PublishError) -> None:
        """Log why nothing is written."""
        if self._trouble != error.reason:
            self._trouble = error.reason
            log.warning("cannot write the FedPipeNode (%s): %s", error.reason, error)

    def wrote(self) -> None:
        """Log that writing works (again)."""
        if self._trouble != "":
            self._trouble = ""
            log.info("the FedPipeNode is written")


def _last_status(publisher: Publisher) -> FedPipeNodeStatus | None:
    """Return what an earlier probe wrote, or None; the first write reports any problem."""
    try:
        return publisher.load()
    except PublishError:
        return None


def _vary(seconds: float) -> float:
    return seconds * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 - spreads load, guards nothing
