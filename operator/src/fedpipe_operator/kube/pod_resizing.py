# SPDX-License-Identifier: Apache-2.0
"""Changes what agents request while they run, as `reconcile` asks for it."""

import logging
from collections.abc import Sequence

from .api import Api, ApiError
from .fields import one_line
from .pod_resources import Kept, Resize
from .tracked_job import TrackedJob

log = logging.getLogger(__name__)


async def resize_pods(api: Api, known: TrackedJob, resizes: Sequence[Resize]) -> None:
    """Resize Pods in place; one that the cluster does not resize keeps its requests, and is left alone."""
    wanted = {resize.pod.uid: resize.requests for resize in resizes}
    known.kept = {uid: kept for uid, kept in known.kept.items() if wanted.get(uid) == kept.wanted}
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
            known.kept[pod.uid] = Kept(resize.requests, why=one_line(str(error)))
            log.warning("job %s: Pod %s %s", known.title, pod.name, known.kept[pod.uid])
