# SPDX-License-Identifier: Apache-2.0
"""A listening socket whose connections are bounded in number, time and memory before they are known.

asyncio accepts and shakes hands with any caller, and aiohttp sees a connection only after that. So this
accepts by itself: a connection is counted from its first packet, by its address. Who shows a valid token
leaves the count of strangers, so that thousands of agents may share one address (a NAT, a proxy).
"""

import asyncio
import asyncio.sslproto
import contextlib
import ipaddress
import logging
import resource
import socket
import ssl
import time
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TypeVar

from aiohttp import web, web_fileresponse

from fedpipe_api.base import UserError

from .connection import Connection
from .guard import NO_TRACEBACKS, guard

K = TypeVar("K", bound=Hashable)

log = logging.getLogger(__name__)

TLS_BUFFER = 32 * 1024
"""Bytes that asyncio keeps for each TLS connection; its 256 KiB make half a gigabyte for 2,000 agents."""

_CLOSE_SECONDS = 2.0
_LINGER_SECONDS = 5.0
_BACKLOG = 1024
_SPARE_FILES = 256
_REPORT_SECONDS = 10.0


@dataclass(frozen=True)
class Limits:
    """What a server holds at a time. Strangers are connections that have shown no valid token."""

    connections: int = 8192
    strangers: int = 2048
    strangers_per_address: int = 1024
    per_identity: int = 16
    per_tenant: float = 0.5
    """Of all connections, the share that all identities of one tenant may have."""
    handshake_seconds: float = 10.0
    stranger_seconds: float = 10.0
    """From the handshake, or the last response, to a whole request."""
    idle_seconds: float = 75.0
    """The same, for known connections."""


class Site(web.BaseSite):
    """Accepts connections for a runner."""

    def __init__(
        self, runner: web.BaseRunner, listener: socket.socket, context: ssl.SSLContext | None, limits: Limits
    ) -> None:
        super().__init__(runner, ssl_context=context)
        assert runner.server is not None
        self.limits = limits
        self.stranger_seconds = limits.stranger_seconds
        self._served = runner
        self._make_protocol = runner.server
        self._listener = listener
        self._context = context
        self._most = min(limits.connections, _open_files() - _SPARE_FILES)
        self._strangers: Counter[str] = Counter()
        self._most_of_tenant = int(self._most * limits.per_tenant)
        self._known: Counter[Hashable] = Counter()
        self._tenants: Counter[Hashable] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None
        self._reported: dict[str, tuple[float, int]] = {}

    @property
    def name(self) -> str:
        """Return the address."""
        host, port = self._listener.getsockname()[:2]
        return f"{'https' if self._context else 'http'}://{host}:{port}"

    @property
    def port(self) -> int:
        """Return the port, also where any was asked for."""
        return int(self._listener.getsockname()[1])

    async def start(self) -> None:
        """Begin to accept."""
        await super().start()
        self._listener.setblocking(False)
        self._listener.listen(_BACKLOG)
        self._accepting = asyncio.create_task(self._accept(), name=f"accept {self.name}")

    async def stop(self) -> None:
        """Accept no more; what is accepted goes on."""
        if self._accepting:
            self._accepting.cancel()
        for task in self._tasks:
            task.cancel()
        self._listener.close()
        await super().stop()

    async def close(self) -> None:
        """Stop, and end what is accepted: requests under way have the runner's shutdown_timeout."""
        await self._served.cleanup()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, peer = await loop.sock_accept(self._listener)
            except ConnectionError:
                continue
            except OSError as error:  # no file descriptor or no memory: others may give some back
                log.error("accept: %s", error.strerror)
                await asyncio.sleep(1.0)
                continue
            address = _network(peer[0]) if peer else ""
            refusal = self._refusal(address)
            if refusal:
                self.report(refusal)
                accepted.close()
                continue
            self._strangers[address] += 1
            task = asyncio.create_task(self._connect(accepted, address))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _refusal(self, address: str) -> str | None:
        strangers = self._strangers.total()
        if strangers + self._known.total() >= self._most:
            return f"came above the {self._most} that the server holds"
        if strangers >= self.limits.strangers:
            return f"came above the {self.limits.strangers} without a valid token that the server holds"
        if self._strangers[address] >= self.limits.strangers_per_address:
            return f"came above the {self.limits.strangers_per_address} without a valid token of one address"
        return None

    async def _connect(self, accepted: socket.socket, address: str) -> None:
        connection = Connection(self, address, self._make_protocol())
        try:
            accepted.setblocking(False)
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection,
                accepted,
                ssl=self._context,
                ssl_handshake_timeout=self.limits.handshake_seconds if self._context else None,
                ssl_shutdown_timeout=_CLOSE_SECONDS if self._context else None,
            )
        except (OSError, asyncio.CancelledError):
            if not connection.made:
                self.forget(connection, address)

    def know(self, connection: Connection, address: str, identity: Hashable, tenant: Hashable) -> bool:
        """Move a connection from the strangers to an identity of a tenant; False when either has enough."""
        if self._known[identity] >= self.limits.per_identity:
            return False
        if self._tenants[tenant] - (tenant == connection.tenant) >= self._most_of_tenant:
            return False
        self.forget(connection, address)
        self._known[identity] += 1
        self._tenants[tenant] += 1
        return True

    def forget(self, connection: Connection, address: str) -> None:
        """Count a connection no longer."""
        if connection.identity is None:
            _decrement(self._strangers, address)
        else:
            _decrement(self._known, connection.identity)
            _decrement(self._tenants, connection.tenant)

    def report(self, what: str) -> None:
        """Log what was refused, once in a while with its number: who is refused may come again at once."""
        now = time.monotonic()
        last, number = self._reported.get(what, (-_REPORT_SECONDS, 0))
        if now - last < _REPORT_SECONDS:
            self._reported[what] = last, number + 1
            return
        self._reported[what] = now, 0
        log.warning("%s: %d connections closed: each %s", self.name, number + 1, what)


def _decrement(counter: Counter[K], key: K) -> None:
    counter[key] -= 1
    if counter[key] <= 0:
        del counter[key]


def _network(address: str) -> str:
    """Return what one client surely shares: an IPv4 address, or the /64 of an IPv6 address."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((int(parsed) >> 64 << 64, 64)))
    return str(parsed)


def _open_files() -> int:
    """Raise this process's limit of open files as far as it may, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = 1 << 20
    if soft < hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 20), hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; UserError when the port cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise UserError(f"port {port}: {error.strerror}; choose another or end what uses it") from None


async def serve(
    app: web.Application,
    listener: socket.socket,
    context: ssl.SSLContext | None = None,
    *,
    shutdown_timeout: float = 5.0,
    limits: Limits = Limits(),
) -> Site:
    """Serve an application, its requests guarded, until its site is closed."""
    asyncio.sslproto.SSLProtocol.max_size = TLS_BUFFER
    if context is not None:
        # asyncio's sendfile puts its own protocol in place of Connection: readers are never too slow,
        # and one that leaves is a traceback. aiohttp reads AIOHTTP_NOSENDFILE at its import alone.
        web_fileresponse.NOSENDFILE = True  # type: ignore[misc]
    logging.getLogger("aiohttp.server").addFilter(NO_TRACEBACKS)
    app.middlewares.insert(0, guard)
    runner = web.AppRunner(
        app,
        access_log=None,
        shutdown_timeout=shutdown_timeout,
        keepalive_timeout=limits.idle_seconds,
        lingering_time=_LINGER_SECONDS,
        # Bodies are taken as they come: a few compressed bytes must not become many here.
        auto_decompress=False,
    )
    await runner.setup()
    site = Site(runner, listener, context, limits)
    await site.start()
    return site
