# SPDX-License-Identifier: Apache-2.0
"""A coordinator process behind TLS, and connections to it that nobody uses well."""

import asyncio
import json
import os
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path

import psutil

import standins.serving
from standins.forked import Forked
from standins.raw_http import Stream, answer, connect

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
    arguments = [str(directory), str(port), json.dumps(limits)]
    process = Forked(standins.serving.program, arguments, log, os.environ, Path.cwd())
    try:
        async with asyncio.timeout(60):
            while not (directory / "ready").exists():
                assert process.poll() is None, log.read_text()
                await asyncio.sleep(0.02)
        yield Process(port, log, process.pid)
        process.terminate()
        assert await asyncio.to_thread(process.wait, 30) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            await asyncio.to_thread(process.wait)
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
