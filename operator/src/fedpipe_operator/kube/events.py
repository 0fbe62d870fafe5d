# SPDX-License-Identifier: Apache-2.0
"""Events on jobs: what a person would want to know, written in the background and never twice in a row."""

import asyncio
import logging
import time
from collections import OrderedDict
from datetime import UTC, datetime
from secrets import token_hex

from fedpipe_api.names import GROUP, VERSION

from ..engine import JobEvent
from .api import Api, ApiError, Document

log = logging.getLogger(__name__)

QUEUE = 1000
"""Events that wait while the API server is away; more are dropped, because Events are not the record."""

AGAIN_SECONDS = 600.0
"""The same Event of a job is not repeated for so long."""

RETRY_SECONDS = 5.0


class EventRecorder:
    """Posts the events of jobs as Events of Kubernetes."""

    def __init__(self, api: Api, component: str) -> None:
        self._api = api
        self._component = component
        self._queue: asyncio.Queue[tuple[str, Document]] = asyncio.Queue(QUEUE)
        self._recent: OrderedDict[tuple[str, str, str], float] = OrderedDict()

    def record(self, namespace: str, name: str, uid: str, event: JobEvent) -> None:
        """Queue an Event on a job."""
        now = time.monotonic()
        key = (uid, event.reason, event.message)
        if now - self._recent.get(key, -AGAIN_SECONDS) < AGAIN_SECONDS:
            return
        self._recent[key] = now
        self._recent.move_to_end(key)
        if len(self._recent) > QUEUE:
            self._recent.popitem(last=False)
        try:
            self._queue.put_nowait((namespace, self._event(namespace, name, uid, event)))
        except asyncio.QueueFull:
            log.warning("an Event of job %s/%s was dropped: %s", namespace, name, event.message)

    def _event(self, namespace: str, name: str, uid: str, event: JobEvent) -> Document:
        at = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{name}.{token_hex(8)}", "namespace": namespace},
            "involvedObject": {
                "apiVersion": f"{GROUP}/{VERSION}",
                "kind": "FedPipeJob",
                "namespace": namespace,
                "name": name,
                "uid": uid,
            },
            "type": "Warning" if event.warning else "Normal",
            "reason": str(event.reason),
            "message": event.message[:1024],
            "firstTimestamp": at,
            "lastTimestamp": at,
            "count": 1,
            "source": {"component": self._component},
            "reportingComponent": self._component,
        }

    async def post(self) -> None:
        """Write queued Events until cancelled."""
        while True:
            namespace, event = await self._queue.get()
            while True:
                try:
                    await self._api.create_event(namespace, event)
                except ApiError as error:
                    if error.status == 0 or error.status >= 500:
                        await asyncio.sleep(RETRY_SECONDS)
                        continue
                    log.warning("Event %s: %s", event["message"], error)
                break
