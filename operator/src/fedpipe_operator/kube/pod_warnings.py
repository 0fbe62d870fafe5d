# SPDX-License-Identifier: Apache-2.0
"""Why a Pod does not start where its own status does not say: the kubelet's Warnings, such as FailedMount."""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .api import Api, ApiError
from .fields import FieldReader, Unreadable, one_line
from .views import PodView

log = logging.getLogger(__name__)

QUIET_SECONDS = 20.0
"""A Pod that has waited so long is asked about, and asked about again; most volumes are mounted sooner."""

AT_ONCE = 5
"""Pods of a job that are asked about at a look: a thousand may wait for the same image."""


@dataclass(frozen=True)
class _Answer:
    asked: float
    text: str


class PodWarnings:
    """The latest Warning of each Pod of a job that waits; forgotten when it waits no more."""

    def __init__(self, api: Api, clock: Callable[[], float] = time.time) -> None:
        self._api = api
        self._clock = clock
        self._jobs: dict[str, dict[str, _Answer]] = {}

    def of(self, pod: PodView) -> str | None:
        """Return what keeps a Pod from starting, as a clause about it."""
        known = self._jobs.get(pod.job, {}).get(pod.uid)
        return known.text or None if known and pod.phase == "Pending" else None

    async def ask(self, job: str, pods: Iterable[PodView]) -> bool:
        """Look up those of a job's Pods that have waited for long, now and then; return whether any was."""
        before, answers, asked = self._jobs.get(job, {}), {}, 0
        for pod in pods:
            if pod.phase != "Pending" or pod.deleting or pod.trouble is not None:
                continue
            known = before.get(pod.uid, _Answer(pod.created, ""))
            if asked < AT_ONCE and known.asked + QUIET_SECONDS <= self._clock():
                asked += 1
                known = _Answer(self._clock(), await self._ask(pod) or known.text)
            answers[pod.uid] = known
        self._jobs[job] = answers
        if not answers:
            self.forget(job)
        return bool(asked)

    def forget(self, job: str) -> None:
        """Forget a job's Pods."""
        self._jobs.pop(job, None)

    async def _ask(self, pod: PodView) -> str:
        try:
            text = _latest(await self._api.warnings_of(pod.namespace, pod.uid))
        except (ApiError, Unreadable) as error:
            log.warning("Events of Pod %s/%s: %s; trying again", pod.namespace, pod.name, error)
            return ""
        return text and f"its Pod does not start: {text}"


def _latest(events: Iterable[FieldReader]) -> str:
    """Return reason and message of the newest Event; empty if there is none."""
    ranked = sorted((_seen(event), event.text("reason"), event.text("message")) for event in events)
    return one_line(f"{ranked[-1][1]}: {ranked[-1][2]}") if ranked else ""


def _seen(event: FieldReader) -> float:
    series = event.object("series").time("lastObservedTime")
    times = (series, event.time("lastTimestamp"), event.time("eventTime"))
    return max((at for at in times if at is not None), default=0.0)
