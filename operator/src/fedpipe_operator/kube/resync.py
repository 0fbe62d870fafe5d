# SPDX-License-Identifier: Apache-2.0
"""Lists what there is: all before the watches begin, and later to find what vanished while one was broken."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from fedpipe_api.base import UserError
from fedpipe_api.names import GROUP, JOB_LABEL, JOBS, NODES, VERSION

from ..engine import Engine
from .api import Api, ApiError
from .controller import Controller
from .settings import OperatorSettings

log = logging.getLogger(__name__)

RESYNC_SECONDS = 120.0

# Objects asked for at once: reading more would hold up the event loop.
PAGE = 500
WHOLE_PAGE = 50

_METADATA = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
_CUSTOM = f"/apis/{GROUP}/{VERSION}"


class Resync:
    """Compares what is known with what there is; but for `fill` by metadata alone."""

    def __init__(self, api: Api, engine: Engine, controller: Controller, settings: OperatorSettings) -> None:
        self._api = api
        self._engine = engine
        self._controller = controller
        self._unwatched: set[str] = set()
        self._drop_unknown = settings.drop_unknown_jobs
        self._namespaces = frozenset(settings.namespaces)
        self._scopes = [f"/namespaces/{name}" for name in settings.namespaces] or [""]

    async def fill(self) -> None:
        """Take in all nodes and Pods, so that no job is looked at with only some of them known."""
        inventory = self._controller.inventory
        async for body in self._pages("/api/v1/nodes", {}):
            inventory.see_node(body)
        async for body in self._pages(f"{_CUSTOM}/{NODES}", {}):
            inventory.see_capacity(body)
        for scope in self._scopes:
            async for body in self._pages(f"/api/v1{scope}/pods", {"labelSelector": JOB_LABEL}):
                inventory.see_pod(body)

    async def watch(self) -> None:
        """Compare again and again until cancelled."""
        while True:
            await asyncio.sleep(RESYNC_SECONDS)
            try:
                await self.compare()
            except ApiError as error:
                log.warning("resync: %s; trying again", error)

    async def check_store(self) -> None:
        """Raise UserError for a store none of whose jobs the cluster has: it is another cluster's.

        There the jobs have other uids, also those of the same names. A job that is deleted here is still
        there, by its finalizer, until the operator has seen it.
        """
        known = {
            uid
            for uid, namespace in (await self._engine.namespaces()).items()
            if not self._namespaces or namespace in self._namespaces
        }
        if not known or self._drop_unknown or known & await self._uids(_CUSTOM, JOBS, self._scopes):
            return
        raise UserError(
            f"none of the {len(known)} jobs in the store is in this cluster, as if its volume or a backup "
            "came from another one; nothing was changed. Use the store of this cluster, or set "
            "operator.dropUnknownJobs=true in the values of the chart to remove these jobs and their adapters"
        )

    async def drop_jobs(self) -> None:
        """Forget jobs of the ledger that the API server has no more.

        A job of a namespace that is not watched (any more) stays, with its adapter: nothing shows that it was
        deleted. Nor does a quarantined job go whose namespace cannot be read while only some are watched.
        """
        known = {uid: job.state.namespace for uid, job in self._engine.jobs.items()}
        known |= {uid: found.namespace for uid, found in self._engine.quarantined.items()}
        there = await self._uids(_CUSTOM, JOBS, self._scopes)
        for uid, namespace in known.items():
            if uid in there:
                continue
            if self._namespaces and namespace not in self._namespaces:
                self._report_unwatched(uid, namespace)
                continue
            log.info("job %s was deleted while nobody watched", uid)
            await self._controller.forget_job(uid)

    def _report_unwatched(self, uid: str, namespace: str) -> None:
        if uid not in self._unwatched:
            self._unwatched.add(uid)
            log.warning(
                "job %s is of namespace %s, which is not watched: it is kept; watch the "
                "namespace again to go on with it or to delete it",
                uid,
                namespace or "(unknown)",
            )

    async def compare(self) -> None:
        """Forget what is gone. What is known is listed first, so that nothing new counts as gone."""
        inventory = self._controller.inventory
        pods, nodes = inventory.pod_uids(), set(inventory.nodes)
        capacities = set(inventory.capacities)
        await self.drop_jobs()
        there = await self._uids("/api/v1", "pods", self._scopes, {"labelSelector": JOB_LABEL})
        for uid in pods.keys() - there:
            inventory.lose_pod(*pods[uid], uid)
        for name in nodes - await self._names("/api/v1", "nodes"):
            inventory.lose_node(name)
        for name in capacities - await self._names(_CUSTOM, NODES):
            inventory.lose_capacity(name)

    async def _uids(
        self, group: str, plural: str, scopes: list[str], query: dict[str, str] | None = None
    ) -> set[str]:
        found = [
            meta for scope in scopes for meta in await self._list(f"{group}{scope}/{plural}", query or {})
        ]
        return {str(meta["uid"]) for meta in found}

    async def _names(self, group: str, plural: str) -> set[str]:
        return {str(meta["name"]) for meta in await self._list(f"{group}/{plural}", {})}

    async def _list(self, path: str, query: dict[str, str]) -> list[dict[str, Any]]:
        return [item["metadata"] async for item in self._pages(path, query, PAGE, accept=_METADATA)]

    async def _pages(
        self, path: str, query: dict[str, str], size: int = WHOLE_PAGE, accept: str = "application/json"
    ) -> AsyncIterator[dict[str, Any]]:
        page = {"limit": str(size)} | query
        while True:
            answer = await self._api.request("list", "GET", path, query=page, accept=accept)
            for item in answer["items"] or ():
                yield item
            more = answer["metadata"].get("continue")
            if not more:
                return
            page["continue"] = more
