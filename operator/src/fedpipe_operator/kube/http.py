# SPDX-License-Identifier: Apache-2.0
"""What the operator answers besides agents: probes of the kubelet, Prometheus, and who wants an adapter."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Handler

from fedpipe_api.names import ADAPTER_AUDIENCE

from ..coordinator.http import cutting_off
from ..engine import Engine, Refused
from ..engine.allowances import Allowance
from ..engine.jobs import Job
from ..export.archive import AdapterArchive
from ..metrics import OperatorMetrics
from ..tracking.page import page
from .access import METRICS, Access, adapter_right, bearer

log = logging.getLogger(__name__)

SENT_AT_ONCE, SENT_AT_ONCE_OF_TENANT, SENT_AT_ONCE_OF_JOB = 64, 4, 2
"""Adapters being sent: to readers, and as many again to the Pods that write spec.output."""

SLOWEST = 128 * 1024
"""Bytes per second at which an adapter must be read at least: a slow reader stands in others' way."""

GRACE_SECONDS = 60.0

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
        # Before anything is looked up, so that a caller without the right cannot learn which jobs exist.
        await access.check(bearer(request), ADAPTER_AUDIENCE, adapter_right(namespace, name))
        job = _find(engine, namespace, name)
        if job is None:
            raise Refused(404, "JobUnknown", f"there is no job {name} in namespace {namespace}")
        if job.state.adapter is None:
            raise Refused(404, "NoAdapter", f"job {name} has no adapter before its first round is done")
        return await sending.send(request, job)

    return adapter


class RoundPages(Allowance):
    """How many pages of rounds a namespace may ask for: each is made by the event loop that serves all."""

    SECONDS = 0.2


OwnPod = Callable[[str], Awaitable[str | None]]
"""Returns the uid of the job that a token's Pod works for, if it is the Pod of the job's that may ask."""


def own_adapter(engine: Engine, writer: OwnPod) -> Handler:
    """Return the coordinator's handler that gives a job's adapter to its Pod that writes spec.output."""
    sending = _Sending(engine)

    async def adapter(request: web.Request) -> web.StreamResponse:
        job = await _own_job(engine, writer, request)
        if job.state.adapter is None:
            raise Refused(404, "NoAdapter", "the job has no adapter")
        return await sending.send(request, job)

    return adapter


def own_rounds(engine: Engine, tracker: OwnPod) -> Handler:
    """Return the coordinator's handler that gives a job's rounds to the Pod that sends them to spec.tracking.

    `?after=N` asks for those after round N, -1 for all; the answer is a `Page`.
    """
    pages = RoundPages()

    async def rounds(request: web.Request) -> web.StreamResponse:
        job = await _own_job(engine, tracker, request)
        try:
            after = int(request.query.get("after", "")[:10])
        except ValueError:
            raise Refused(400, "BadRequest", "after must be the number of a round, or -1") from None
        if after < job.state.done - 1 and not pages.take(job.state.namespace):
            raise Refused(429, "TooManyRequests", "the namespace reads too many rounds", retry_after=5)
        return web.json_response(page(job.state, after).to_dict())

    return rounds


async def _own_job(engine: Engine, own_pod: OwnPod, request: web.Request) -> Job:
    uid = await own_pod(bearer(request))
    if uid is None:
        raise Refused(401, "Unauthenticated", "no valid bearer token")
    job = engine.jobs.get(uid)
    if job is None:
        raise Refused(404, "JobUnknown", "the job is gone")
    return job


class _Sending:
    """Sends adapters from the store piece by piece, a few at a time: readers fill neither memory nor disk."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._now: Counter[str] = Counter()
        self._tenants: Counter[str] = Counter()

    async def send(self, request: web.Request, job: Job) -> web.StreamResponse:
        """Answer with the job's adapter as a tar; Refused 429 when too many are being sent.

        Who has not read it after GRACE_SECONDS and its size at SLOWEST is cut off, and so is who still reads
        it when the job has gone, or needs it no more.
        """
        uid, namespace = job.state.uid, job.state.namespace
        if (
            self._now.total() >= SENT_AT_ONCE
            or self._tenants[namespace] >= SENT_AT_ONCE_OF_TENANT
            or self._now[uid] >= SENT_AT_ONCE_OF_JOB
        ):
            raise Refused(429, "TooManyRequests", "too many adapters are being read", retry_after=5)
        self._now[uid] += 1
        self._tenants[namespace] += 1
        try:
            return await self._send(request, job)
        finally:
            self._now[uid] -= 1
            self._tenants[namespace] -= 1
            # Without those that are 0: jobs and namespaces come and go.
            self._now, self._tenants = +self._now, +self._tenants

    async def _send(self, request: web.Request, job: Job) -> web.StreamResponse:
        state = job.state
        assert state.adapter is not None
        assert state.model is not None
        spec, model, digest = state.spec, state.model, state.adapter.digest
        path = await self._engine.readable(state.uid, digest)
        with self._engine.readers.reading(digest, cutting_off(request)):
            try:
                source = path.open("rb")
            except FileNotFoundError:
                text = f"job {state.name} has a newer adapter, or none any more"
                raise Refused(503, "AdapterReplaced", text, retry_after=1) from None
            with source:
                archive = await asyncio.to_thread(AdapterArchive, source.fileno(), spec, model)
                response = web.StreamResponse(headers={"FedPipe-Digest": digest})
                response.content_type, response.content_length = "application/x-tar", len(archive)
                await response.prepare(request)
                try:
                    async with asyncio.timeout(GRACE_SECONDS + len(archive) / SLOWEST):
                        await _write(response, archive)
                except TimeoutError:
                    log.warning("adapter of %s/%s: its reader was too slow", state.namespace, state.name)
                    cutting_off(request)()
        return response


async def _write(response: web.StreamResponse, archive: AdapterArchive) -> None:
    chunks = archive.chunks()
    while chunk := await asyncio.to_thread(next, chunks, b""):
        await response.write(chunk)


def _find(engine: Engine, namespace: str, name: str) -> Job | None:
    found = (j for j in engine.jobs.values() if (j.state.namespace, j.state.name) == (namespace, name))
    return next(found, None)
