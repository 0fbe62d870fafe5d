# SPDX-License-Identifier: Apache-2.0
"""Bodies of requests: large, slow or unfinished ones hold little memory and nobody up."""

import asyncio
import json
import threading
from collections import Counter
from pathlib import Path

import aiohttp
import pytest

from fedpipe_api.wire import CONTROL_LIMIT, Registration, read_message
from fedpipe_operator.coordinator import bodies
from fedpipe_operator.coordinator.bodies import Bodies
from fedpipe_operator.engine import Refused
from standins.agents import model_shape, registration
from standins.coordinator_process import MIB, ask, opened, serving
from standins.local import local
from standins.raw_http import answer, request


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
