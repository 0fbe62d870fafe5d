# SPDX-License-Identifier: Apache-2.0
"""A way to the API server that can be cut, frozen, or made to answer 409: plain HTTP in, TLS out."""

import asyncio
import socket
import ssl
import threading
from contextlib import suppress

import aiohttp
from aiohttp import web

from kube.controlplane import ControlPlane

HOP = {"transfer-encoding", "content-length", "connection", "content-encoding"}


class Proxy:
    """`mode` is pass, away (connections are cut), conflict (two of three writes get 409) or frozen.

    A watch on which something came while frozen never says anything again, whatever the mode is later.
    """

    def __init__(self, plane: ControlPlane) -> None:
        self.mode = "pass"
        self.conflicts = 0
        self._plane = plane
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(30)

    def _run(self, started: threading.Event) -> None:
        # It ends what is still under way, such as frozen watches.
        asyncio.run(self._serve(started))

    async def _serve(self, started: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        context = ssl.create_default_context(cafile=self._plane.ca)
        connector = aiohttp.TCPConnector(ssl=context, limit=0)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as self._session:
            app = web.Application(client_max_size=1 << 30)
            app.router.add_route("*", "/{path:.*}", self._forward)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            assert site._server is not None
            self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
            started.set()
            await self._stop.wait()
            await runner.cleanup()

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        if self.mode == "away":
            assert request.transport
            request.transport.close()
            raise web.HTTPServiceUnavailable
        if self.mode == "conflict" and request.method in ("POST", "PATCH", "PUT"):
            self.conflicts += 1
            if self.conflicts % 3:
                body = {
                    "kind": "Status",
                    "status": "Failure",
                    "reason": "Conflict",
                    "code": 409,
                    "message": "busy",
                }
                return web.json_response(body, status=409)
        headers = {k: v for k, v in request.headers.items() if k.lower() not in ("host", "content-length")}
        body_bytes = await request.read()
        async with self._session.request(
            request.method, self._plane.url + request.raw_path, headers=headers, data=body_bytes or None
        ) as answer:
            kept = {k: v for k, v in answer.headers.items() if k.lower() not in HOP}
            response = web.StreamResponse(status=answer.status, headers=kept)
            await response.prepare(request)
            with suppress(ConnectionError, aiohttp.ClientError):
                async for chunk in answer.content.iter_any():
                    if self.mode == "frozen" and "watch=true" in request.query_string:
                        await asyncio.Event().wait()
                    if self.mode == "away":
                        assert request.transport
                        request.transport.close()
                        break
                    await response.write(chunk)
            return response

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        """Stop listening."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)


def pipe(source: socket.socket, sink: socket.socket) -> None:
    """Pass on what one socket receives until either ends."""
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()
