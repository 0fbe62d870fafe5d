# SPDX-License-Identifier: Apache-2.0
"""One connection: between a transport and aiohttp's protocol."""

import asyncio
from collections.abc import Hashable
from typing import Protocol, cast

from aiohttp import web

STRANGER_BYTES = 128 * 1024
"""Bytes that a connection may send, bodies not counted, before it has shown a valid token."""

HEAD_BYTES = 64 * 1024
"""Bytes that a known connection may send beside the body of its request."""

READ_AHEAD, READ_AHEAD_TLS = 512 * 1024, 128 * 1024
"""Bytes of a body that may come with its head, before its request is looked at: two reads of asyncio's."""

WRITE_BUFFER = 64 * 1024
"""Bytes waiting to be sent from which a response waits for its reader."""

STALL_SECONDS = 90.0
"""A reader that leaves such a buffer full for so long is cut off."""


class Keeper(Protocol):
    """Who counts connections (see site.py)."""

    stranger_seconds: float

    def know(self, connection: "Connection", address: str, identity: Hashable, tenant: Hashable) -> bool:
        """Move a connection from the strangers to an identity of a tenant; False when either has enough."""
        ...

    def forget(self, connection: "Connection", address: str) -> None:
        """Count a connection no longer."""
        ...

    def report(self, what: str) -> None:
        """Log what was cut off."""
        ...


class Connection(asyncio.Protocol):
    """Stands between a transport and aiohttp's protocol, and cuts off what takes too much or too long."""

    def __init__(self, site: "Keeper", address: str, inner: asyncio.Protocol) -> None:
        self._site = site
        self._address = address
        self._inner = inner
        self._transport: asyncio.Transport | None = None
        self._left = 0
        self._known_bytes = 0
        self._expiry: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self.identity: Hashable | None = None
        self.tenant: Hashable | None = None
        self.made = False

    # Called by the middlewares

    def begin(self, body: int) -> None:
        """Note that a request has come whose body may have so many bytes."""
        self._left = body + (self._left if self.identity is None else self._known_bytes)
        self._cancel_expiry()

    def end(self) -> None:
        """Note that the request has its answer."""
        if self.identity is None:
            self._expire_later()
        else:
            self._left = self._known_bytes

    def know(self, identity: Hashable, tenant: Hashable) -> bool:
        """Note whose connection this is; False when it is one too many of that identity or its tenant."""
        if self.identity == identity:
            return True
        if not self._site.know(self, self._address, identity, tenant):
            return False
        self.identity, self.tenant = identity, tenant
        return True

    # Called by the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for a request."""
        self.made = True
        self._transport = cast(asyncio.Transport, transport)
        ahead = READ_AHEAD if transport.get_extra_info("sslcontext") is None else READ_AHEAD_TLS
        self._left, self._known_bytes = STRANGER_BYTES + ahead, HEAD_BYTES + ahead
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
        self._site.forget(self, self._address)
        self._inner.connection_lost(exc)

    def _expire_later(self) -> None:
        self._cancel_expiry()
        seconds = self._site.stranger_seconds
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
