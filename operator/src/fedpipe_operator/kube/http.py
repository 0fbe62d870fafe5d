"""The operator's plain HTTP port: probes of the kubelet, Prometheus, and finished adapters."""

import asyncio
import io
import tarfile
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web

from ..coordinator import Identify
from ..engine import Engine
from ..engine.jobs import Job
from ..engine.state import JobState
from ..export import write_adapter
from ..metrics import Figures

ADAPTER_PATH = "/v1/jobs/{namespace}/{name}/adapter"


def http_application(engine: Engine, figures: Figures, unready: Callable[[], str | None]) -> web.Application:
    """Return the application; `unready` says why the operator cannot work yet."""

    async def healthz(request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def readyz(request: web.Request) -> web.Response:
        reason = unready()
        return web.Response(text=reason or "ok", status=503 if reason else 200)

    async def metrics(request: web.Request) -> web.Response:
        body = await figures.text()
        return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def adapter(request: web.Request) -> web.Response:
        namespace, name = request.match_info["namespace"], request.match_info["name"]
        job = _find(engine, namespace, name)
        if job is None:
            return web.Response(status=404, text=f"there is no job {name} in namespace {namespace}")
        if job.state.adapter is None:
            return web.Response(status=404, text=f"job {name} has no adapter before its first round is done")
        body = await asyncio.to_thread(adapter_tar, engine, job.state)
        digest = job.state.adapter.digest
        return web.Response(body=body, content_type="application/x-tar", headers={"FedPipe-Digest": digest})

    app = web.Application()
    app.add_routes(
        [
            web.get("/healthz", healthz),
            web.get("/readyz", readyz),
            web.get("/metrics", metrics),
            web.get(ADAPTER_PATH, adapter),
        ]
    )
    return app


def own_adapter(engine: Engine, identify: Identify) -> Callable[[web.Request], Awaitable[web.Response]]:
    """Return the coordinator's handler that gives a job's adapter to the job's own Pods."""

    async def adapter(request: web.Request) -> web.Response:
        identity = await identify(request.headers["Authorization"].partition(" ")[2])
        job = engine.jobs.get(identity.job) if identity else None
        if job is None or job.state.adapter is None:
            raise web.HTTPNotFound(reason="the job has no adapter")
        return web.Response(body=await asyncio.to_thread(adapter_tar, engine, job.state))

    return adapter


def _find(engine: Engine, namespace: str, name: str) -> Job | None:
    found = (j for j in engine.jobs.values() if (j.state.namespace, j.state.name) == (namespace, name))
    return next(found, None)


def export_adapter(engine: Engine, state: JobState, directory: Path) -> None:
    """Write the job's latest adapter as a PEFT directory. Blocks; use a thread."""
    assert state.adapter is not None
    assert state.model is not None
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
