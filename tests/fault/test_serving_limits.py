# SPDX-License-Identifier: Apache-2.0
"""What a caller can send, hold open or leave unfinished: bounded, refused in one line, never a traceback."""

import asyncio
import contextlib
import io
import json
import os
import re
import signal
import socket
import ssl
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil
import pytest
from aiohttp import web

import standins.serving
from fedpipe_api.logs import one_line
from fedpipe_api.wire import CONTROL_LIMIT, Registration, read_message
from fedpipe_operator.coordinator import Identity, application, bodies
from fedpipe_operator.coordinator.bodies import Bodies
from fedpipe_operator.engine import Refused
from fedpipe_operator.kube import http
from fedpipe_operator.serving import Limits, connection, listen, serve
from standins.agents import model_shape, registration
from standins.local import local, working
from standins.raw_http import Stream, answer, connect, request
from standins.server import UID, job

MIB = 1 << 20


@dataclass
class Process:
    """A coordinator process behind TLS."""

    port: int
    log: Path
    pid: int

    async def connect(self, address: str = "127.0.0.1") -> Stream:
        """Open a TLS connection from a loopback address."""
        return await connect(self.port, address)

    def memory(self) -> int:
        """Return the resident bytes."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def connections(self) -> int:
        """Return how many connections the process holds."""
        return sum(found.status == "ESTABLISHED" for found in psutil.Process(self.pid).net_connections("tcp"))


@asynccontextmanager
async def serving(directory: Path, **limits: float) -> AsyncIterator[Process]:
    """Run a coordinator; afterwards its log has no traceback."""
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port = probe.getsockname()[1]
    log = directory / "log"
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            standins.serving.__file__,
            str(directory),
            str(port),
            json.dumps(limits),
            stdout=asyncio.subprocess.PIPE,
            stderr=file,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
    assert process.stdout
    try:
        line = await asyncio.wait_for(process.stdout.readline(), 60)
        assert line == b"ready\n", log.read_text()
        yield Process(port, log, process.pid)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 30) == 0, log.read_text()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert "Traceback" not in log.read_text()


async def ask(server: Process, sent: bytes, address: str = "127.0.0.1") -> tuple[int, bytes]:
    """Send bytes on a new connection; return the answer's status and body."""
    stream = await server.connect(address)
    stream[1].write(sent)
    try:
        status, _, body = await answer(stream)
        return status, body
    finally:
        stream[1].transport.abort()


async def opened(server: Process, number: int) -> list[Stream]:
    """Open idle connections; those that are refused are left out."""

    async def one() -> Stream | None:
        try:
            return await server.connect()
        except (OSError, ssl.SSLError):
            return None

    found: list[Stream] = []
    for begin in range(0, number, 50):
        batch = await asyncio.gather(*(one() for _ in range(begin, min(number, begin + 50))))
        found += [stream for stream in batch if stream]
    return found


async def ended(stream: Stream, seconds: float) -> bool:
    """Return whether the server ends the connection within so many seconds."""
    try:
        return await asyncio.wait_for(stream[0].read(), seconds) is not None
    except TimeoutError:
        return False
    except (ConnectionError, ssl.SSLError):
        return True


async def test_idle_strangers_are_few_short_lived_and_in_nobody_elses_way(tmp_path: Path) -> None:
    async with serving(tmp_path, strangers_per_address=40, stranger_seconds=12) as server:
        agent = await server.connect()
        agent[1].write(request("GET /v1/job"))
        assert (await answer(agent))[0] == 200
        before = server.memory()
        strangers = await opened(server, 120)
        assert server.connections() <= 41
        assert server.memory() - before < 14 * MIB
        agent[1].write(request("GET /v1/job"))
        assert (await answer(agent))[0] == 200, "who is known has its connection"
        assert (await ask(server, request("GET /v1/job"), "127.0.0.2"))[0] == 200, (
            "and so has another address"
        )
        assert all(await asyncio.gather(*(ended(stream, 40) for stream in strangers)))
        assert (await ask(server, request("GET /v1/job")))[0] == 200
        agent[1].transport.abort()
    assert "without a valid token of one address" in server.log.read_text()


async def test_long_polls_of_one_address_are_no_strangers(tmp_path: Path) -> None:
    async with serving(tmp_path, strangers_per_address=20, stranger_seconds=2) as server:
        polls = []
        for number in range(60):
            stream = await server.connect()
            stream[1].write(request("GET /v1/assignment?wait=5", f"job-{number % 4}/node-{number % 3}"))
            polls.append(stream)
            await asyncio.sleep(0.01)
        statuses = [found[0] for found in await asyncio.gather(*(answer(stream) for stream in polls))]
        assert statuses.count(204) == 60
        for stream in polls:
            stream[1].transport.abort()


async def test_agents_of_one_tenant_leave_connections_to_others(tmp_path: Path) -> None:
    async def identify(token: str) -> Identity | None:
        name, _, node = token.partition("/")
        return Identity(name, node)

    async with local(tmp_path, nodes=1) as served:
        wanted = job(1, 1)
        metadata = wanted.metadata.model_copy(update={"uid": "job-2", "namespace": "team-b"})
        await served.engine.submit(wanted.model_copy(update={"metadata": metadata}))
        place = await serve(
            application(served.engine, identify), listen("127.0.0.1", 0), limits=Limits(connections=10)
        )
        streams: list[Stream] = []

        async def asked(token: str) -> int:
            streams.append(await asyncio.open_connection("127.0.0.1", place.port))
            streams[-1][1].write(request("GET /v1/job", token))
            return (await answer(streams[-1]))[0]

        assert [await asked(f"{UID}/node-{number}") for number in range(6)] == [200] * 5 + [429]
        assert await asked("job-2/node-0") == 200
        streams[0][1].transport.abort()
        streams[5][1].transport.abort()
        async with asyncio.timeout(20):
            while await asked(f"{UID}/node-6") != 200:
                streams[-1][1].transport.abort()
                await asyncio.sleep(0.05)
        for _, writer in streams:
            writer.transport.abort()
        await place.close()


async def test_large_messages_are_read_beside_the_loop_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, reading, at_once = threading.Event(), Counter[str](), list[int]()

    def slow(kind: type[Registration], body: bytes) -> Registration:
        reading["now"] += 1
        at_once.append(reading["now"])
        assert gate.wait(20), "the event loop goes on meanwhile"
        reading["now"] -= 1
        return read_message(kind, body)

    monkeypatch.setattr("fedpipe_operator.coordinator.http.read_message", slow)
    body = registration(model_shape(2000)).to_json()
    assert len(body) > CONTROL_LIMIT
    async with local(tmp_path, nodes=4) as served, aiohttp.ClientSession() as session:

        async def register(node: str) -> int:
            headers = {"Authorization": f"Bearer token-{node}"}
            async with session.post(f"{served.address}/v1/agents", data=body, headers=headers) as found:
                return found.status

        tasks = [asyncio.create_task(register(node)) for node in served.nodes]
        async with asyncio.timeout(20):
            while not at_once:
                await asyncio.sleep(0.01)
            async with session.get(f"{served.address}/v1/link") as found:
                assert found.status == 200
        gate.set()
        assert await asyncio.gather(*tasks) == [200] * 4
    assert at_once == [1] * 4


async def test_a_head_that_drips_in_is_cut_off(tmp_path: Path) -> None:
    async with serving(tmp_path, stranger_seconds=2) as server:
        stream = await server.connect()
        dripping = asyncio.create_task(ended(stream, 20))
        begin = asyncio.get_running_loop().time()
        for byte in b"GET /v1/job HTTP/1.1\r\nX-Slow: " + 200 * b"a":
            if dripping.done():
                break
            stream[1].write(bytes([byte]))
            await asyncio.sleep(0.1)
        assert await dripping
        assert asyncio.get_running_loop().time() - begin < 10
        stream[1].transport.abort()


async def test_a_handshake_that_never_comes_is_cut_off(tmp_path: Path) -> None:
    async with serving(tmp_path, handshake_seconds=1) as server:
        streams = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(20)]
        assert all(await asyncio.gather(*(ended(stream, 20) for stream in streams)))
        for stream in streams:
            stream[1].transport.abort()


async def test_a_large_body_may_come_at_once(tmp_path: Path) -> None:
    body = b'{"version": "' + bytes(MIB - 100)
    async with serving(tmp_path) as server:
        stream = await server.connect()
        for _ in range(20):
            stream[1].write(
                request("POST /v1/agents", "job-0/node-0", f"Content-Length: {len(body)}", body=body)
            )
            status, _, found = await answer(stream)
            assert (status, json.loads(found)["reason"]) == (422, "Invalid")
        stream[1].transport.abort()


async def test_a_large_body_may_come_at_once_over_plain_http(tmp_path: Path) -> None:
    async with local(tmp_path, nodes=1) as served, aiohttp.ClientSession() as session:
        body = bytes(MIB - 100)
        for _ in range(20):
            url, headers = f"{served.address}/v1/agents", {"Authorization": "Bearer token-node-0"}
            async with session.post(url, data=body, headers=headers) as found:
                assert found.status == 422


async def test_unfinished_bodies_hold_little_memory(tmp_path: Path) -> None:
    size = MIB
    async with serving(tmp_path) as server:
        assert (await ask(server, request("GET /v1/job")))[0] == 200
        before = server.memory()
        head = request("POST /v1/agents", "job-0/node-0", f"Content-Length: {size}")
        streams = await opened(server, 100)
        for stream in streams:
            stream[1].write(head + bytes(size - 1))
        answers = [asyncio.create_task(answer(stream)) for stream in streams]
        while sum(not task.done() for task in answers) > 2:
            await asyncio.sleep(0.1)
        early = {task.result()[0] for task in answers if task.done()}
        assert early <= {0, 429}, "one agent sends two bodies at a time"
        assert server.memory() - before < 30 * MIB
        assert (await ask(server, request("GET /v1/job", "job-1/node-1")))[0] == 200
        for stream in streams:
            stream[1].transport.abort()


async def test_memory_for_bodies_is_shared_by_tenants() -> None:
    held = Bodies(total=100, of_tenant=60, wait=0.05)
    first, second = "team-a", "team-b"
    async with held.hold(first, 60):
        with pytest.raises(Refused, match="try again") as refused:
            async with held.hold(first, 1):
                pass
        assert (refused.value.status, refused.value.retry_after) == (503, 2)
        async with held.hold(second, 40):
            pass
    async with held.hold(first, 60):
        pass


async def test_a_message_waits_for_the_memory_of_another() -> None:
    held = Bodies(total=100, of_tenant=100, wait=10)

    async def after(entered: asyncio.Event) -> None:
        async with held.hold("team-a", 100):
            entered.set()

    async with held.hold("team-a", 60):
        entered = asyncio.Event()
        task = asyncio.create_task(after(entered))
        await asyncio.sleep(0)
        assert not entered.is_set()
    await asyncio.wait_for(task, 5)


async def test_a_slow_body_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(bodies, "SLOWEST", 1 << 30)
    async with local(tmp_path, nodes=1) as served:
        host, port = served.address.removeprefix("http://").split(":")
        stream = await asyncio.open_connection(host, int(port))
        stream[1].write(request("POST /v1/progress", "token-node-0", "Content-Length: 1000") + b"{")
        status, _, body = await answer(stream)
        assert (status, json.loads(body)["reason"]) == (408, "TooSlow")
        stream[1].transport.abort()


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


FORGED = "%0a2026-11-29 00:00:00,000 INFO fedpipe_operator: all is well%1b[2J%c2%85%e2%80%a8"


ROWS = [
        (request("GET /v1/job", b"\xff\xfe\x80"), {400}),
        (request("GET /v1/job", "no-such/token"), {401}),
        (request("GET /v1/job", None, "Authorization: Basic x"), {401}),
        (request("GET /v1/blobs/" + 64 * "0", "job-0/node-0", "Range: bytes=5-1"), {416}),
        (request("GET /v1/blobs/" + 64 * "0", "job-0/node-0", "Range: chunks=1"), {416}),
        (request("GET /v1/blobs/" + 64 * "0", "job-0/node-0", "Range: bytes=" + 5000 * "9" + "-"), {416}),
        (
            request(
                "GET /v1/blobs/" + 64 * "0",
                "job-0/node-0",
                "If-Modified-Since: Mon, 01 Jan 99999999999999999999 00:00:00 GMT",
            ),
            {400},
        ),
        (request("GET /v1/blobs/" + FORGED.replace(" ", "%20")), {404}),
        (request("GET /%00%ff%fe"), {404}),
        (request("GET /v1/assignment?wait=%0a%ff"), {400}),
        (request("GET /v1/assignment?wait=nan"), {200, 204}),
        (request("PUT /v1/rounds/" + 400 * "9" + "/update"), {400, 404, 422}),
        (request("POST /v1/agents", "job-0/node-0", "Content-Length: 1", "Content-Encoding: gzip", body=b"x"), {415}),
        (request("POST /v1/agents", "job-0/node-0", "Transfer-Encoding: chunked", body=b"zz\r\n"), {400}),
        (request("POST /v1/agents", None, "Transfer-Encoding: chunked", body=b"5\r\nabcde\r\nzz\r\n"), {400, 401}),
        (request("POST /v1/agents", "job-0/node-0", "Content-Length: -1"), {400}),
        (request("POST /v1/agents", "job-0/node-0", "Content-Length: " + 5000 * "9"), {400, 413}),
        (request("GET /v1/job", "job-0/node-0", "Expect: a-miracle"), {417}),
        (request("DELETE /v1/job"), {405}),
        (b"\x16\x03\x01\x00\xff\x00\r\n\r\n", {400}),
        (b"GET / HTTP/9.9\r\n\r\n", {400, 401, 404}),
        (request("GET /v1/job", "job-0/node-0", "X-Long: " + 40000 * "a"), {400}),
]  # fmt: skip


async def test_whatever_is_sent_is_refused_in_one_line(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        for sent, statuses in ROWS:
            status, body = await ask(server, sent)
            assert status in statuses, (sent[:200], body)
            assert b"Traceback" not in body
            assert not body.startswith(b"{") or b"\n" not in body
    lines = server.log.read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 10
    for line in lines:
        assert re.match(r"\d{4}-\d\d-\d\d [\d:,]+ [A-Z]+ [\w.]+: ", line), line
        assert not line.startswith("2026-11-29 00:00:00,000 INFO fedpipe_operator: all is well")


def test_one_line_keeps_text_and_escapes_what_moves_it() -> None:
    assert one_line("straße, 東京 ok") == "straße, 東京 ok"
    assert one_line("a\nb\r\x1b[0m\u2028\u202e\x85\ud800") == r"a\nb\r\x1b[0m\u2028\u202e\x85\ud800"


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
