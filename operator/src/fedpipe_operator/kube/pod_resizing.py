# SPDX-License-Identifier: Apache-2.0
"""Changes what agents request while they run, as `reconcile` asks for it."""

import logging
from collections.abc import Sequence

from .api import Api, ApiError
from .pod_resources import Resize
from .tracked_job import TrackedJob

log = logging.getLogger(__name__)


async def resize_pods(api: Api, known: TrackedJob, resizes: Sequence[Resize]) -> None:
    """Resize Pods in place; one that the cluster does not resize keeps its requests, and is left alone."""
    kept = {resize.pod.uid: resize.requests for resize in resizes}
    known.kept = {uid: requests for uid, requests in known.kept.items() if kept.get(uid) == requests}
    for resize in resizes:
        pod = resize.pod
        if pod.uid in known.kept:
            continue
        try:
            await api.resize_pod(pod.namespace, pod.name, pod.uid, resize.requests)
        except ApiError as error:
            if error.status == 409:
                continue  # somebody else wrote, or the Pod is gone: the next look knows
            if not error.permanent and error.status not in (404, 405):
                raise
            # A cluster before 1.33, or a quota.
            known.kept[pod.uid] = resize.requests
            log.warning("job %s: Pod %s keeps its requests: %s", known.title, pod.name, error)
