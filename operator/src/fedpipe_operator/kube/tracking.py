# SPDX-License-Identifier: Apache-2.0
"""`spec.tracking` in a cluster: a Pod of the job's namespace sends rounds; the operator sends nothing."""

import time
from collections.abc import Callable
from urllib.parse import urlsplit

from fedpipe_api.conditions import Reason
from fedpipe_api.job import FedPipeJob
from fedpipe_api.tracking import Tracking

from ..engine.events import JobEvent
from ..engine.state import JobState
from .api import Api, ApiError
from .events import EventRecorder
from .inventory import Inventory
from .job_status import TrackingResult
from .pods import EVENTS_DIRECTORY, build_tracker_pod, volume_place
from .settings import OperatorSettings
from .tracked_job import TrackedJob
from .views import TRACKER

RECOVERY_SECONDS = 90.0
"""A Pod that was started again works once it has run so long; a server that is away ends it sooner."""


def refusal(tracking: Tracking, settings: OperatorSettings) -> str | None:
    """Return why a cluster does not take a job's spec.tracking, None if it does."""
    if tracking.tensor_board and tracking.volume is None:
        return "spec.tracking.volume: required by tensorBoard in a cluster; give a claim or hostPath"
    if tracking.mlflow is None:
        return None
    uri = urlsplit(tracking.mlflow.uri)
    if uri.scheme == "file":
        return "spec.tracking.mlflow.uri: must be http(s)://host:port in a cluster"
    if f"{uri.scheme}://{uri.netloc}".lower() in settings.tracking_allowed:
        return None
    some = "not that server" if settings.tracking_allowed else "no server"
    return (
        f"spec.tracking.mlflow.uri: this cluster allows {some}; "
        "its administrator adds it to tracking.allowed in the values of the chart"
    )


class JobTracking:
    """Has one Pod for each job with spec.tracking while it lacks rounds; only the Pod knows what it lacks."""

    def __init__(
        self,
        api: Api,
        settings: OperatorSettings,
        events: EventRecorder,
        inventory: Inventory,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._api = api
        self._settings = settings
        self._events = events
        self._inventory = inventory
        self._clock = clock

    async def tend(self, known: TrackedJob, job: FedPipeJob, state: JobState, trouble: str | None) -> None:
        """Make the Pod where it is due, and keep what became of it; `trouble` is why it does not start."""
        complete = known.tracking is not None and known.tracking.reason is Reason.ROUNDS_TRACKED
        if job.spec.tracking is None or state.plan is None or complete:
            return
        pod = self._inventory.own_pod(job.metadata, TRACKER)
        # A hostPath stays where the Pod runs, although a later plan has other nodes.
        node = (pod.bound if pod else "") or min(state.plan.nodes, default="")
        try:
            if pod is None:
                await self._api.create_pod(build_tracker_pod(job, node, self._settings))
            elif pod.phase == "Failed" and not pod.deleting:
                # Evicted, for example. Its successor has the same name.
                await self._api.delete_pod(pod.namespace, pod.name, pod.uid, force=False)
        except ApiError as error:
            if not error.permanent:
                raise
            self._record(known, Reason.TRACKING_FAILED, str(error))
            return
        trouble = trouble or (pod.trouble if pod else None)
        if trouble:
            self._record(known, Reason.TRACKING_FAILED, f"spec.tracking: {trouble}")
        elif pod is not None and pod.phase == "Succeeded":
            self._record(known, Reason.ROUNDS_TRACKED, _places(job, node))
        elif pod is None or pod.restarted is None or not self._failed_lately(known):
            self._record(known, Reason.TRACKING, _places(job, node))

    def _failed_lately(self, known: TrackedJob) -> bool:
        before = known.tracking
        return (
            before is not None
            and before.reason is Reason.TRACKING_FAILED
            and self._clock() < before.at + RECOVERY_SECONDS
        )

    def _record(self, known: TrackedJob, reason: Reason, message: str) -> None:
        result, before = TrackingResult(reason, message[:1024], self._clock()), known.tracking
        known.tracking = result
        if result == before:
            return
        known.changed.set()
        if reason is not Reason.TRACKING:
            event = JobEvent(reason is Reason.TRACKING_FAILED, reason, result.message)
            self._events.record(known.namespace, known.name, known.uid, event)


def _places(job: FedPipeJob, node: str) -> str:
    """Return where the rounds are sent, as people write it."""
    tracking = job.spec.tracking
    assert tracking is not None
    found = []
    if tracking.volume is not None:
        found.append(volume_place(tracking.volume, f"{EVENTS_DIRECTORY}/{job.metadata.name}", node))
    if tracking.mlflow is not None:
        found.append(f"{tracking.mlflow.uri} experiment {tracking.mlflow.experiment or job.metadata.name}")
    return ", ".join(found)
