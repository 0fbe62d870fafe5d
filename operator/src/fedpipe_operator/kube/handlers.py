# SPDX-License-Identifier: Apache-2.0
"""kopf's handlers: each hands what it saw to the controller. All decisions are in `reconcile`."""

from typing import Any

import kopf

from fedpipe_api.names import FINALIZER, GROUP, JOB_LABEL, JOBS, NODES

from .api import ApiError
from .controller import Controller
from .shallow import Login

TIMER_SECONDS = 60.0

SILENT_SECONDS = 70.0
"""A watch on which nothing came for this long is treated as dead and opened again."""

UNCHANGING = ("spec.model", "spec.data", "spec.adapter", "spec.nodes.selector")
"""Fields that cannot change and may be large: kopf's note of the last spec must fit into an annotation."""


def kopf_settings() -> kopf.OperatorSettings:
    """Return kopf's settings."""
    found = kopf.OperatorSettings()
    found.posting.enabled = False  # Events are written by kube/events.py, which bounds and counts them
    found.posting.loggers = False
    found.watching.inactivity_timeout = SILENT_SECONDS
    found.watching.server_timeout = 300
    found.watching.client_timeout = 310
    found.watching.connect_timeout = 30
    found.watching.label_selectors["", "v1", "pods"] = JOB_LABEL
    found.networking.request_timeout = 30
    found.execution.default_backoff = 15
    # Changing these makes every handler run again for every job.
    found.persistence.finalizer = FINALIZER
    found.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=GROUP, v1=False)
    found.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(
        prefix=GROUP, v1=False, ignored_fields=UNCHANGING
    )
    found.scanning.disabled = True  # CRDs and namespaces are there before the operator
    return found


def register(controller: Controller) -> kopf.OperatorRegistry:
    """Return the handlers, bound to the controller."""
    registry = kopf.OperatorRegistry()
    inventory, login = controller.inventory, Login()

    @kopf.on.login(registry=registry)
    async def connect(**kwargs: Any) -> Any:
        return login(**kwargs)

    # Not kopf's indices: they hold back every object until all are indexed, and wake all whenever one
    # is, which is the square of thousands. `Resync.fill` has filled the inventory before instead.
    @kopf.on.event("", "v1", "nodes", registry=registry)
    async def node(event: Any, body: kopf.Body, name: str, **_: Any) -> None:
        if event["type"] == "DELETED":
            inventory.lose_node(name)
        else:
            inventory.see_node(body)

    @kopf.on.event(GROUP, NODES, registry=registry)
    async def capacity(event: Any, body: kopf.Body, name: str, **_: Any) -> None:
        if event["type"] == "DELETED":
            inventory.lose_capacity(name)
        else:
            inventory.see_capacity(body)

    @kopf.on.event("", "v1", "pods", labels={JOB_LABEL: kopf.PRESENT}, registry=registry)
    async def pod(event: Any, body: kopf.Body, namespace: str | None, name: str, uid: str, **_: Any) -> None:
        if event["type"] == "DELETED":
            inventory.lose_pod(namespace or "", name, uid)
        else:
            inventory.see_pod(body)

    @kopf.on.resume(GROUP, JOBS, registry=registry)
    @kopf.on.create(GROUP, JOBS, registry=registry)
    @kopf.on.update(GROUP, JOBS, field="spec", registry=registry)
    @kopf.timer(GROUP, JOBS, interval=TIMER_SECONDS, registry=registry)
    async def job_seen(body: kopf.Body, **_: Any) -> None:
        controller.see_job(body)

    @kopf.on.delete(GROUP, JOBS, registry=registry)
    async def job_deleted(uid: str, **_: Any) -> None:
        try:
            await controller.forget_job(uid)
        except ApiError as error:
            raise kopf.TemporaryError(str(error), delay=5) from None

    return registry
