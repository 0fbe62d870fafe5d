# SPDX-License-Identifier: Apache-2.0
"""Connections that strangers open, hold or never finish are few and short, and in nobody else's way."""

import asyncio
from pathlib import Path

from fedpipe_operator.coordinator import Identity, application
from fedpipe_operator.serving import Limits, listen, serve
from standins.coordinator_process import MIB, ask, ended, opened, serving
from standins.local import local
from standins.raw_http import Stream, answer, request
from standins.server import UID, job


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
