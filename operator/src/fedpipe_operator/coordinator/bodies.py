# SPDX-License-Identifier: Apache-2.0
"""Bodies on their way: how much memory they take together, and how long each may take to arrive."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from weakref import WeakValueDictionary

from aiohttp import web

from ..engine import Refused
from ..engine.jobs import Signal

TOTAL_BYTES = 64 << 20
"""Of messages in memory, over all tenants."""

TENANT_BYTES = TOTAL_BYTES // 4
"""Of these, for the messages of one tenant's jobs, however many it has."""

WAIT_SECONDS = 10.0
"""How long a message waits for its bytes before its agent is asked to come again."""

UPLOAD_BYTES = 128 << 20
"""Of updates between socket and disk, over all jobs."""

SMALLEST_CHUNK, LARGEST_CHUNK = 64 << 10, 1 << 20

SLOWEST = 4096
"""Bytes per second at which a body must arrive at least."""

GRACE_SECONDS = 30.0

PAUSE_SECONDS = 60.0
"""After so long without a byte a sender is gone: its node waits to send again."""


class Bodies:
    """The memory of all bodies in flight."""

    def __init__(
        self, total: int = TOTAL_BYTES, of_tenant: int = TENANT_BYTES, wait: float = WAIT_SECONDS
    ) -> None:
        self._total = total
        self._of_tenant = of_tenant
        self._wait = wait
        self._held: Counter[str] = Counter()
        self._released = Signal()
        self._uploads = 0
        self._reading: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def hold(self, tenant: str, size: int) -> AsyncIterator[None]:
        """Hold memory for a message of so many bytes; Refused 503 when there is none for a while.

        A slow sender may hold it for minutes, so what one namespace holds is bounded, not only what one job
        does.
        """
        try:
            async with asyncio.timeout(self._wait):
                while not self._fits(tenant, size):
                    await self._released.next.wait()
        except TimeoutError:
            raise Refused(503, "Busy", "too many messages are arriving; try again", retry_after=2) from None
        self._held[tenant] += size
        try:
            yield
        finally:
            self._held[tenant] -= size
            if not self._held[tenant]:
                del self._held[tenant]
            self._released.fire()

    def _fits(self, tenant: str, size: int) -> bool:
        return self._held[tenant] + size <= self._of_tenant and self._held.total() + size <= self._total

    def reading(self, tenant: str) -> asyncio.Lock:
        """Return what a tenant holds while a large message of it is read in a thread: one at a time."""
        return self._reading.setdefault(tenant, asyncio.Lock())

    @contextmanager
    def uploading(self) -> Iterator[Callable[[], int]]:
        """Give the number of bytes to keep before they are written: the more uploads at a time, the fewer."""
        self._uploads += 1
        try:
            yield lambda: max(SMALLEST_CHUNK, min(LARGEST_CHUNK, UPLOAD_BYTES // self._uploads))
        finally:
            self._uploads -= 1


async def arriving(request: web.Request, size: int) -> AsyncIterator[bytes]:
    """Yield the body's pieces, at most `size` bytes; Refused if it breaks off, is too slow or too long.

    A body must have come after GRACE_SECONDS and its size at SLOWEST, without a pause of PAUSE_SECONDS.
    """
    came = 0
    seconds = GRACE_SECONDS + size / SLOWEST
    now = asyncio.get_running_loop().time
    end = now() + seconds
    while True:
        try:
            async with asyncio.timeout_at(min(end, now() + PAUSE_SECONDS)):
                chunk = await request.content.readany()
        except TimeoutError:
            limit = f"in {seconds:.0f} s" if now() >= end else f"and then none for {PAUSE_SECONDS:.0f} s"
            raise Refused(408, "TooSlow", f"{came} of {size} bytes arrived {limit}") from None
        except (web.RequestPayloadError, ConnectionError, asyncio.IncompleteReadError) as error:
            raise Refused(400, "Truncated", f"the body broke off ({error})") from None
        if not chunk:
            return
        came += len(chunk)
        if came > size:
            raise Refused(413, "TooLarge", f"the body has more than {size} bytes")
        yield chunk
