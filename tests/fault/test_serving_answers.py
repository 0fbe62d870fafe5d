# SPDX-License-Identifier: Apache-2.0
"""Answers that are read slowly, not at all, or broken off."""

import asyncio
import contextlib
import io
import ssl
import tarfile
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

import standins.serving
from fedpipe_operator.kube import http
from fedpipe_operator.serving import connection, listen, serve
from standins.coordinator_process import MIB
from standins.local import local, working
from standins.raw_http import connect, request
from standins.server import UID


async def test_an_answer_that_nobody_reads_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STALL_SECONDS", 0.5)
    async with local(tmp_path, nodes=1) as served:
        host, port = served.address.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        writer.write(60 * request("GET /v1/link", None))
        await asyncio.sleep(1.5)
        came = 0
        with contextlib.suppress(ConnectionError):
            while data := await asyncio.wait_for(reader.read(MIB), 20):
                came += len(data)
        assert came < 60 * 256 * 1024
        writer.transport.abort()


async def test_adapters_are_sent_from_disk_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def writer(token: str) -> str | None:
        return UID

    async with local(tmp_path, nodes=1, count=1) as served, working([served.agent("node-0")]):
        await served.finish()
        app = web.Application()
        app.router.add_get("/v1/adapter", http.own_adapter(served.engine, writer))
        place = await serve(app, listen("127.0.0.1", 0))
        url = f"http://127.0.0.1:{place.port}/v1/adapter"
        async with aiohttp.ClientSession() as session:
            async with session.get(url) as found:
                assert found.status == 200
                with tarfile.open(fileobj=io.BytesIO(await found.read())) as archive:
                    names = archive.getnames()
            with monkeypatch.context() as fast:
                fast.setattr(http, "GRACE_SECONDS", 0.0)
                fast.setattr(http, "SLOWEST", 1 << 60)
                with pytest.raises(aiohttp.ClientError):
                    async with session.get(url) as found:
                        await found.read()
            for limit in ("SENT_AT_ONCE_OF_JOB", "SENT_AT_ONCE_OF_TENANT"):
                with monkeypatch.context() as none:
                    none.setattr(http, limit, 0)
                    async with session.get(url) as found:
                        assert (found.status, found.headers["Retry-After"]) == (429, "5")
            async with session.get(url) as found:
                assert len(await found.read()) == found.content_length, "who was cut off stands in no way"
        await place.close()
    assert "adapter_model.safetensors" in names


async def test_a_download_that_breaks_off_leaves_no_traceback_and_is_cut_off_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection, "STALL_SECONDS", 0.5)
    (tmp_path / "blob").write_bytes(bytes(64 * MIB))

    async def blob(request: web.Request) -> web.FileResponse:
        return web.FileResponse(tmp_path / "blob")

    app = web.Application()
    app.router.add_get("/blob", blob)
    place = await serve(app, listen("127.0.0.1", 0), standins.serving.certificate())
    for _ in range(10):
        reader, writer = await connect(place.port)
        writer.write(request("GET /blob", None))
        await reader.readexactly(100)
        writer.transport.abort()
    reader, writer = await connect(place.port)
    writer.write(request("GET /blob", None))
    await asyncio.sleep(2)
    came = 0
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while data := await asyncio.wait_for(reader.read(MIB), 20):
            came += len(data)
    writer.transport.abort()
    await place.close()
    assert came < 32 * MIB
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []
