# SPDX-License-Identifier: Apache-2.0
"""What the operator answers besides agents: probes of the kubelet, Prometheus, and who wants an adapter."""

import asyncio
import copy
import logging
import tarfile
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler

from fedpipe_api.names import ADAPTER_AUDIENCE

from ..engine import Engine, Refused
from ..engine.jobs import Job
from ..engine.state import JobState
from ..export import write_adapter
from ..metrics import OperatorMetrics
from .access import METRICS, Access, adapter_right, bearer

log = logging.getLogger(__name__)

OWN_ADAPTER_PATH = "/v1/adapter"
SENT_AT_ONCE, SENT_AT_ONCE_OF_TENANT, SENT_AT_ONCE_OF_JOB = 8, 4, 2
"""Adapters being sent: to readers, and as many again to the Pods that write spec.output."""

SLOWEST = 128 * 1024
"""Bytes per second at which an adapter must be read at least: a slow reader stands in others' way."""

GRACE_SECONDS = 60.0

_CHUNK = 128 * 1024

ADAPTER_PATH = "/v1/jobs/{namespace}/{name}/adapter"


def health_application(unready: Callable[[], str | None]) -> web.Application:
    """Return what the kubelet asks, over plain HTTP; `unready` says why the operator cannot work yet."""

    async def healthz(request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def readyz(request: web.Request) -> web.Response:
        reason = unready()
        return web.Response(text=reason or "ok", status=503 if reason else 200)

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz)])
    return app


def metrics_application(figures: OperatorMetrics, access: Access) -> web.Application:
    """Return what Prometheus asks, over TLS, for callers that may `get` the path /metrics."""

    async def metrics(request: web.Request) -> web.Response:
        await access.check(bearer(request), None, METRICS)
        body = await figures.text()
        return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    app = web.Application()
    app.add_routes([web.get("/metrics", metrics)])
    return app


def any_adapter(engine: Engine, access: Access) -> Handler:
    """Return the coordinator's handler that gives a job's adapter to readers of fedpipejobs/adapter."""
    sending = _Sending(engine)

    async def adapter(request: web.Request) -> web.StreamResponse:
        namespace, name = request.match_info["namespace"], request.match_info["name"]
        # Before anything is looked up: what exists is no stranger's business either.
        await access.check(bearer(request), ADAPTER_AUDIENCE, adapter_right(namespace, name))
        job = _find(engine, namespace, name)
        if job is None:
            raise Refused(404, "JobUnknown", f"there is no job {name} in namespace {namespace}")
        if job.state.adapter is None:
            raise Refused(404, "NoAdapter", f"job {name} has no adapter before its first round is done")
        return await sending.send(request, job)

    return adapter


def own_adapter(engine: Engine, writer: Callable[[str], Awaitable[str | None]]) -> Handler:
    """Return the coordinator's handler that gives a job's adapter to the Pod that writes it to spec.output.

    `writer` returns the uid of the job that a token's Pod writes the output of.
    """
    sending = _Sending(engine)

    async def adapter(request: web.Request) -> web.StreamResponse:
        uid = await writer(bearer(request))
        if uid is None:
            raise Refused(401, "Unauthenticated", "no valid bearer token")
        job = engine.jobs.get(uid)
        if job is None or job.state.adapter is None:
            raise Refused(404, "NoAdapter", "the job has no adapter")
        return await sending.send(request, job)

    return adapter


class _Sending:
    """Sends adapters from disk piece by piece, a few at a time: no number of readers fills the memory."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._now: Counter[str] = Counter()
        self._tenants: Counter[str] = Counter()

    async def send(self, request: web.Request, job: Job) -> web.StreamResponse:
        """Answer with the job's adapter as a tar; Refused 429 when too many are being sent.

        Who has not read it after GRACE_SECONDS and its size at SLOWEST is cut off.
        """
        # The state as it is now: the job goes on while its adapter is written and sent.
        state = copy.copy(job.state)
        assert state.adapter is not None
        if (
            self._now.total() >= SENT_AT_ONCE
            or self._tenants[state.namespace] >= SENT_AT_ONCE_OF_TENANT
            or self._now[state.uid] >= SENT_AT_ONCE_OF_JOB
        ):
            raise Refused(429, "TooManyRequests", "too many adapters are being read", retry_after=5)
        self._now[state.uid] += 1
        self._tenants[state.namespace] += 1
        try:
            with tempfile.TemporaryDirectory() as temporary:
                path = Path(temporary) / "adapter.tar"
                await asyncio.to_thread(write_adapter_tar, self._engine, state, path)
                response = web.StreamResponse(headers={"FedPipe-Digest": state.adapter.digest})
                response.content_type, response.content_length = "application/x-tar", path.stat().st_size
                await response.prepare(request)
                try:
                    async with asyncio.timeout(GRACE_SECONDS + path.stat().st_size / SLOWEST):
                        await _write(response, path)
                except TimeoutError:
                    log.warning("adapter of %s/%s: its reader was too slow", state.namespace, state.name)
                    if request.transport:
                        request.transport.abort()
            return response
        finally:
            self._now[state.uid] -= 1
            self._tenants[state.namespace] -= 1
            # Without those that are 0: jobs and namespaces come and go.
            self._now, self._tenants = +self._now, +self._tenants


async def _write(response: web.StreamResponse, path: Path) -> None:
    with path.open("rb") as file:
        while chunk := await asyncio.to_thread(file.read, _CHUNK):
            await response.write(chunk)


def _find(engine: Engine, namespace: str, name: str) -> Job | None:
    found = (j for j in engine.jobs.values() if (j.state.namespace, j.state.name) == (namespace, name))
    return next(found, None)


def export_adapter(engine: Engine, state: JobState, directory: Path) -> None:
    """Write the job's latest adapter as a PEFT directory. Blocks; use a thread."""
    assert state.adapter is not None
    assert state.model is not None
    if not engine.blobs.intact(state.adapter.digest):
        raise Refused(
            503, "StoreDamaged", "the adapter is damaged in the store; restore a backup of the store"
        )
    write_adapter(engine.blobs.path(state.adapter.digest), state.spec, state.model, directory)


def write_adapter_tar(engine: Engine, state: JobState, path: Path) -> None:
    """Write the PEFT directory as a tar whose bytes depend on the adapter alone. Blocks; use a thread."""
    directory = path.parent / "adapter"
    export_adapter(engine, state, directory)
    with tarfile.open(path, mode="w") as archive:
        for file in sorted(directory.iterdir()):
            entry = tarfile.TarInfo(file.name)
            entry.size = file.stat().st_size
            entry.mode = 0o644
            with file.open("rb") as content:
                archive.addfile(entry, content)
