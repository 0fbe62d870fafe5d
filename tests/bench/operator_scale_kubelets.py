# SPDX-License-Identifier: Apache-2.0
"""Kubelets at scale: every Pod is bound at once, and a paced agent runs for it in this process."""

import asyncio
import json
import random
import ssl
from dataclasses import dataclass
from typing import Any

import aiohttp

from fedpipe_api.wire import Assignment, AssignmentKind
from kube.controlplane import ControlPlane
from standins.agents import StandIn


@dataclass
class Paced(StandIn):
    """Trains for some seconds; waits long between polls, as agents do."""

    seconds: float = 0.0

    async def run(self) -> None:
        headers = {"Authorization": f"Bearer {self.token}"}
        connector = aiohttp.TCPConnector(ssl=self.context or True)
        async with aiohttp.ClientSession(headers=headers, connector=connector) as self._session:
            while True:
                try:
                    await self._register()
                    while True:
                        work = await self._work()
                        if work is not None and work.kind is AssignmentKind.STOP:
                            return
                except (aiohttp.ClientError, TimeoutError, ConnectionError):
                    await asyncio.sleep(1 + random.random())

    async def _train(self, work: Assignment) -> None:
        await asyncio.sleep(self.seconds * (0.7 + 0.6 * random.random()))
        await super()._train(work)


class Kubelets:
    """Binds every Pod, runs a paced agent for it, and ends it when the Pod is deleted."""

    def __init__(self, plane: ControlPlane, namespace: str, seconds: float) -> None:
        self._plane = plane
        self._pods = f"/api/v1/namespaces/{namespace}/pods"
        self._account = f"/api/v1/namespaces/{namespace}/serviceaccounts/default/token"
        self._authority = f"/api/v1/namespaces/{namespace}/configmaps/fedpipe-ca"
        self._seconds = seconds
        self._agents: dict[str, asyncio.Task[None]] = {}
        self._context: ssl.SSLContext | None = None
        self._limit = asyncio.Semaphore(16)
        self.started = 0

    async def run(self) -> None:
        """Watch Pods until cancelled."""
        api = ssl.create_default_context(cafile=self._plane.ca)
        headers = {"Authorization": f"Bearer {self._plane.token}"}
        connector = aiohttp.TCPConnector(ssl=api, limit=32)
        timeout = aiohttp.ClientTimeout(total=None)
        async with (
            aiohttp.ClientSession(
                self._plane.url, headers=headers, connector=connector, timeout=timeout, read_bufsize=1 << 22
            ) as self._api,
            asyncio.TaskGroup() as group,
        ):
            while True:
                listed = await self._send("GET", self._pods)
                for pod in listed["items"]:
                    self._see(group, pod)
                query = {"watch": "true", "resourceVersion": listed["metadata"]["resourceVersion"]}
                # The API server ends the watch of one who reads too slowly.
                async with self._api.get(self._pods, params=query) as response:
                    async for line in response.content:
                        event = json.loads(line)
                        if event["type"] in ("ADDED", "MODIFIED"):
                            self._see(group, event["object"])

    def _see(self, group: asyncio.TaskGroup, pod: dict[str, Any]) -> None:
        uid = pod["metadata"]["uid"]
        if uid not in self._agents:
            self._agents[uid] = group.create_task(self._play(pod))
        elif "deletionTimestamp" in pod["metadata"]:
            group.create_task(self._end(pod))

    async def _play(self, pod: dict[str, Any]) -> None:
        meta = pod["metadata"]
        name, node = meta["name"], meta["annotations"]["fedpipe.io/node"]
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": name},
            "target": {"name": node},
        }
        bound = {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": meta["uid"]}
        request = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"audiences": ["fedpipe"], "boundObjectRef": bound},
        }
        async with self._limit:
            await self._send("POST", f"{self._pods}/{name}/binding", binding)
            token = (await self._send("POST", self._account, request))["status"]["token"]
            if self._context is None:
                pem = (await self._send("GET", self._authority))["data"]["ca.crt"]
                self._context = ssl.create_default_context(cadata=pem)
            state = {"name": "agent", "image": "a", "imageID": "", "ready": True, "restartCount": 0}
            running = state | {"state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}
            await self._status(name, {"phase": "Running", "containerStatuses": [running]})
        self.started += 1
        address = pod["spec"]["containers"][0]["args"][1]
        await Paced(node, token, lambda: address, context=self._context, seconds=self._seconds).run()
        ended = state | {"state": {"terminated": {"exitCode": 0, "finishedAt": "2026-01-01T00:00:00Z"}}}
        async with self._limit:
            await self._status(name, {"phase": "Succeeded", "containerStatuses": [ended]})

    async def _end(self, pod: dict[str, Any]) -> None:
        self._agents[pod["metadata"]["uid"]].cancel()
        await self._send("DELETE", f"{self._pods}/{pod['metadata']['name']}", {"gracePeriodSeconds": 0})

    async def _status(self, name: str, status: dict[str, Any]) -> None:
        kind = {"Content-Type": "application/merge-patch+json"}
        await self._send("PATCH", f"{self._pods}/{name}/status", {"status": status}, kind)

    async def _send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> dict[str, Any]:
        async with self._api.request(method, path, json=body, headers=headers) as response:
            return dict(await response.json())
