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
from typing import TypeVar, cast

from aiohttp import web
from aiohttp.http import HttpProcessingError

from fedpipe_api.base import UserError

K = TypeVar("K", bound=Hashable)

log = logging.getLogger(__name__)

STRANGER_BYTES = 256 * 1024
"""Bytes that a connection may send, bodies not counted, before it has shown a valid token."""

HEAD_BYTES = 64 * 1024
"""Bytes that a known connection may send beside the body of its request."""

TLS_BUFFER = 32 * 1024
"""Bytes that asyncio keeps for each TLS connection; its 256 KiB make half a gigabyte for 2,000 agents."""

WRITE_BUFFER = 64 * 1024
"""Bytes waiting to be sent from which a response waits for its reader."""

STALL_SECONDS = 90.0
"""A reader that leaves such a buffer full for so long is cut off."""

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
    handshake_seconds: float = 10.0
    stranger_seconds: float = 10.0
    """From the handshake, or the last response, to a whole request."""
    idle_seconds: float = 75.0
    """The same, for known connections."""


class Connection(asyncio.Protocol):
    """Stands between a transport and aiohttp's protocol, and cuts off what takes too much or too long."""

    def __init__(self, site: "Site", address: str, inner: asyncio.Protocol) -> None:
        self._site = site
        self._address = address
        self._inner = inner
        self._transport: asyncio.Transport | None = None
        self._left = STRANGER_BYTES
        self._expiry: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self.identity: Hashable | None = None
        self.made = False

    # Called by the middlewares

    def begin(self, body: int) -> None:
        """Note that a request has come whose body may have so many bytes."""
        self._left = body + (self._left if self.identity is None else HEAD_BYTES)
        self._cancel_expiry()

    def end(self) -> None:
        """Note that the request has its answer."""
        if self.identity is None:
            self._expire_later()

    def know(self, identity: Hashable) -> bool:
        """Note whose connection this is; False when it is one too many of that identity."""
        if self.identity == identity:
            return True
        if not self._site.know(self, self._address, identity):
            return False
        self.identity = identity
        return True

    # Called by the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for a request."""
        self.made = True
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(WRITE_BUFFER)
        self._expire_later()
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Hand on what came."""
        self._left -= len(data)
        if self._left < 0:
            self._site.report("sent more than its requests announced")
            self._abort()
            return
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        """Hand on the end."""
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        """Give the reader a while."""
        self._stall = asyncio.get_running_loop().call_later(STALL_SECONDS, self._stalled)
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        """Note that the reader has read."""
        if self._stall:
            self._stall.cancel()
            self._stall = None
        self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count the connection no longer."""
        self._cancel_expiry()
        if self._stall:
            self._stall.cancel()
        self._transport = None
        self._site.forget(self._address, self.identity)
        self._inner.connection_lost(exc)

    def _expire_later(self) -> None:
        self._cancel_expiry()
        seconds = self._site.limits.stranger_seconds
        self._expiry = asyncio.get_running_loop().call_later(seconds, self._expired)

    def _cancel_expiry(self) -> None:
        if self._expiry:
            self._expiry.cancel()
            self._expiry = None

    def _expired(self) -> None:
        if self._stall:  # an answer is on its way
            self._expire_later()
        elif self._transport:
            self._transport.close()

    def _stalled(self) -> None:
        self._site.report("left its answer unread")
        self._abort()

    def _abort(self) -> None:
        if self._transport:
            self._transport.abort()


def connection_of(request: web.BaseRequest) -> Connection | None:
    """Return the connection of a request; None when it is gone or another kind of site accepted it."""
    transport = request.transport
    protocol = transport.get_protocol() if transport else None
    return protocol if isinstance(protocol, Connection) else None


class Site(web.BaseSite):
    """Accepts connections for a runner."""

    def __init__(
        self, runner: web.BaseRunner, listener: socket.socket, context: ssl.SSLContext | None, limits: Limits
    ) -> None:
        super().__init__(runner, ssl_context=context)
        assert runner.server is not None
        self.limits = limits
        self._served = runner
        self._make_protocol = runner.server
        self._listener = listener
        self._context = context
        self._most = min(limits.connections, _open_files() - _SPARE_FILES)
        self._strangers: Counter[str] = Counter()
        self._known: Counter[Hashable] = Counter()
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
                self.forget(address, None)

    def know(self, connection: Connection, address: str, identity: Hashable) -> bool:
        """Move a connection from the strangers to an identity's; False when that has enough."""
        if self._known[identity] >= self.limits.per_identity:
            return False
        self._known[identity] += 1
        self._subtract(address, connection.identity)
        return True

    def forget(self, address: str, identity: Hashable | None) -> None:
        """Count a connection no longer."""
        self._subtract(address, identity)

    def _subtract(self, address: str, identity: Hashable | None) -> None:
        if identity is None:
            _decrement(self._strangers, address)
        else:
            _decrement(self._known, identity)

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


class _NoTracebacks(logging.Filter):
    """What a client sent is no fault of the server: one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError):
            record.levelno, record.levelname = logging.INFO, "INFO"
            record.msg, record.args = f"{record.getMessage()}: %s", (" ".join(error.message.split())[:200],)
            record.exc_info = None
        return True


_NO_TRACEBACKS = _NoTracebacks()


async def serve(
    app: web.Application,
    host: str,
    port: int,
    context: ssl.SSLContext | None = None,
    *,
    shutdown_timeout: float = 5.0,
    limits: Limits = Limits(),
) -> Site:
    """Serve an application until its site is closed; UserError when the port cannot be had."""
    asyncio.sslproto.SSLProtocol.max_size = TLS_BUFFER
    logging.getLogger("aiohttp.server").addFilter(_NO_TRACEBACKS)
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
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        await runner.cleanup()
        raise UserError(f"port {port}: {error.strerror}; choose another or end what uses it") from None
    site = Site(runner, listener, context, limits)
    await site.start()
    return site
