# SPDX-License-Identifier: Apache-2.0
"""How much one agent may ask for at a time."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from aiohttp import web

from ..engine import Refused
from ..serving import connection_of
from .identity import Identity

REQUESTS = 8
"""Requests of one agent under way; a well-behaved one has at most four."""

BODIES = 2
"""Of these, requests with a body: a sign of life beside an update or a message."""


class Callers:
    """Counts each agent's requests under way; `tenant` returns the namespace of a job."""

    def __init__(self, tenant: Callable[[str], str]) -> None:
        self._tenant = tenant
        self._requests: Counter[Identity] = Counter()
        self._bodies: Counter[Identity] = Counter()

    @contextmanager
    def calling(self, request: web.Request, who: Identity) -> Iterator[None]:
        """Count a request while it is under way; Refused 429 when it is one too many."""
        connection = connection_of(request)
        if connection and not connection.know(who, self._tenant(who.job)):
            raise Refused(429, "TooManyConnections", f"{who.node}: too many connections", retry_after=2)
        body = int(request.can_read_body)
        if self._requests[who] >= REQUESTS or self._bodies[who] + body > BODIES:
            raise Refused(429, "TooManyRequests", f"{who.node}: too many requests at a time", retry_after=2)
        self._requests[who] += 1
        self._bodies[who] += body
        try:
            yield
        finally:
            self._requests[who] -= 1
            self._bodies[who] -= body
            if not self._requests[who]:
                del self._requests[who], self._bodies[who]
