# SPDX-License-Identifier: Apache-2.0
"""Who reads adapters and blobs: no number of readers takes disk, and none keeps a removed file on it."""

import asyncio
import contextlib
import io
import os
import socket
import tarfile
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web, web_fileresponse

from fedpipe_operator.coordinator import application
from fedpipe_operator.engine.jobs import Job
from fedpipe_operator.kube import http
from fedpipe_operator.kube.own_requests import OWN_ROUNDS_PATH
from fedpipe_operator.serving import listen, serve
from standins.agents import model_shape
from standins.local import Local, local, working
from standins.raw_http import request
from standins.server import UID, identify, job

WIDE = model_shape(matrices=32, rows=1 << 16, columns=16)
RANKS = {"ranks": {"min": 4, "max": 4}}
"""With these a model's adapter has 34 MB, and what is downloaded 8 MB: more than a connection's buffers."""


@asynccontextmanager
async def adapters(served: Local) -> AsyncIterator[str]:
    """Serve adapters; a token is the uid of a job whose adapter it may read."""

    async def writer(token: str) -> str | None:
        return token

    app = web.Application()
    app.router.add_get("/v1/adapter", http.own_adapter(served.engine, writer))
    site = await serve(app, listen("127.0.0.1", 0))
    try:
        yield f"http://127.0.0.1:{site.port}"
    finally:
        await site.close()


@asynccontextmanager
async def unread(address: str, path: str, token: str) -> AsyncIterator[asyncio.StreamReader]:
    """Ask for something big and read no more than its first bytes."""
    host, port = address.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((host, int(port)))
    reader, writer = await asyncio.open_connection(sock=connection, limit=4096)
    writer.write(request(f"GET {path}", token))
    assert b" 200 " in await reader.readline()
    try:
        yield reader
    finally:
        writer.transport.abort()


async def ended(reader: asyncio.StreamReader) -> int:
    """Return how many bytes still came before the connection was cut."""
    came = 0
    async with asyncio.timeout(30):
        try:
            while data := await reader.read(1 << 20):
                came += len(data)
        except ConnectionError:
            pass
    return came


def open_files(directory: Path) -> list[str]:
    """Return the names of this process's open files below a directory."""
    names = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            names.append(os.readlink(entry))
        except OSError:
            continue
    return [name for name in names if name.startswith(str(directory))]


async def test_readers_of_one_namespace_take_no_disk_and_leave_another_its_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        local(tmp_path, nodes=1, count=1, adapter=RANKS) as served,
        working([served.agent("node-0", WIDE)]),
    ):
        await served.finish(240)
        # Nothing that is sent is written anywhere first.
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no-such-directory"))
        known = served.engine.jobs[UID].state
        for i in range(20):
            other = replace(known, uid=f"greedy-{i}", name=f"job-{i}", namespace="greedy")
            served.engine.jobs[other.uid] = Job(other)
        async with (
            adapters(served) as address,
            aiohttp.ClientSession() as session,
            contextlib.AsyncExitStack() as held,
        ):
            for i in range(http.SENT_AT_ONCE_OF_TENANT):
                await held.enter_async_context(unread(address, "/v1/adapter", f"greedy-{i}"))
            for i in range(20):
                given = {"Authorization": f"Bearer greedy-{i}"}
                async with session.get(f"{address}/v1/adapter", headers=given) as refused:
                    assert (refused.status, refused.headers["Retry-After"]) == (429, "5")
            async with session.get(
                f"{address}/v1/adapter", headers={"Authorization": f"Bearer {UID}"}
            ) as found:
                assert found.status == 200
                body = await found.read()
    with tarfile.open(fileobj=io.BytesIO(body)) as archive:
        assert archive.getnames() == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


async def test_a_deleted_jobs_adapter_is_not_kept_by_who_reads_it_slowly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_fileresponse, "NOSENDFILE", True)  # as behind TLS
    async with (
        local(tmp_path, nodes=1, count=1, adapter=RANKS) as served,
        working([served.agent("node-0", WIDE)]),
    ):
        await served.finish(240)
        state = served.engine.jobs[UID].state
        assert state.adapter is not None
        sent = state.sent_after(1)
        assert sent is not None
        async with adapters(served) as address:
            whole = state.adapter.size
            async with (
                unread(address, "/v1/adapter", UID) as reader,
                unread(served.address, f"/v1/blobs/{sent.digest}", "token-node-0") as node,
            ):
                assert open_files(tmp_path / "blobs")
                await served.engine.delete(UID)
                assert await ended(reader) < whole
                assert await ended(node) < sent.size
                while open_files(tmp_path / "blobs"):
                    await asyncio.sleep(0.05)
            # And the job may come again.
            await served.engine.submit(job(1, 1))


async def test_a_namespace_that_reads_rounds_without_end_waits_between(tmp_path: Path) -> None:
    async def tracker(token: str) -> str | None:
        return UID if token == "tracker" else None

    async with local(tmp_path, count=3) as served, working([served.agent(node) for node in served.nodes]):
        await served.finish()
        routes = {OWN_ROUNDS_PATH: http.own_rounds(served.engine, tracker)}
        site = await serve(application(served.engine, identify, routes), listen("127.0.0.1", 0))
        url = f"http://127.0.0.1:{site.port}{OWN_ROUNDS_PATH}"
        try:
            async with aiohttp.ClientSession(headers={"Authorization": "Bearer tracker"}) as session:

                async def status(after: int) -> int:
                    async with session.get(f"{url}?after={after}") as answer:
                        return answer.status

                found = Counter([await status(-1) for _ in range(150)])
                assert set(found) == {200, 429}
                assert found[200] >= 100
                assert await status(3) == 200, "to ask whether there is more costs next to nothing"
        finally:
            await site.close()
