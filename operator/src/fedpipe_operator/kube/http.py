"""What the operator answers besides agents: probes of the kubelet, Prometheus, and who wants an adapter."""

import asyncio
import io
import tarfile
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler

from fedpipe_api.names import ADAPTER_AUDIENCE

from ..engine import Engine, Refused
from ..engine.jobs import Job
from ..engine.state import JobState
from ..export import write_adapter
from ..metrics import Figures
from .access import METRICS, Access, adapter_right, bearer

OWN_ADAPTER_PATH = "/v1/adapter"
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


def metrics_application(figures: Figures, access: Access) -> web.Application:
    """Return what Prometheus asks, over TLS, for whoever may `get` the path /metrics."""

    async def metrics(request: web.Request) -> web.Response:
        await access.check(bearer(request), None, METRICS)
        body = await figures.text()
        return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    app = web.Application()
    app.add_routes([web.get("/metrics", metrics)])
    return app


def any_adapter(engine: Engine, access: Access) -> Handler:
    """Return the coordinator's handler that gives a job's adapter to readers of fedpipejobs/adapter."""

    async def adapter(request: web.Request) -> web.Response:
        namespace, name = request.match_info["namespace"], request.match_info["name"]
        # Before anything is looked up: what exists is no stranger's business either.
        await access.check(bearer(request), ADAPTER_AUDIENCE, adapter_right(namespace, name))
        job = _find(engine, namespace, name)
        if job is None:
            raise Refused(404, "JobUnknown", f"there is no job {name} in namespace {namespace}")
        if job.state.adapter is None:
            raise Refused(404, "NoAdapter", f"job {name} has no adapter before its first round is done")
        body = await asyncio.to_thread(adapter_tar, engine, job.state)
        digest = job.state.adapter.digest
        return web.Response(body=body, content_type="application/x-tar", headers={"FedPipe-Digest": digest})

    return adapter


def own_adapter(engine: Engine, writer: Callable[[str], Awaitable[str | None]]) -> Handler:
    """Return the coordinator's handler that gives a job's adapter to the Pod that writes it to spec.output.

    `writer` returns the uid of the job that a token's Pod writes the output of.
    """

    async def adapter(request: web.Request) -> web.Response:
        uid = await writer(bearer(request))
        if uid is None:
            raise Refused(401, "Unauthenticated", "no valid bearer token")
        job = engine.jobs.get(uid)
        if job is None or job.state.adapter is None:
            raise Refused(404, "NoAdapter", "the job has no adapter")
        return web.Response(body=await asyncio.to_thread(adapter_tar, engine, job.state))

    return adapter


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


def adapter_tar(engine: Engine, state: JobState) -> bytes:
    """Return the PEFT directory as a tar whose bytes depend on the adapter alone. Blocks; use a thread."""
    buffer = io.BytesIO()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "adapter"
        export_adapter(engine, state, directory)
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for path in sorted(directory.iterdir()):
                entry = tarfile.TarInfo(path.name)
                entry.size = path.stat().st_size
                entry.mode = 0o644
                with path.open("rb") as file:
                    archive.addfile(entry, file)
    return buffer.getvalue()
