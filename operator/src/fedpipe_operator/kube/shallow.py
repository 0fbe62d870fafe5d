# SPDX-License-Identifier: Apache-2.0
"""Cuts the API server's JSON of jobs down to a depth that every parser takes.

The API server keeps up to 10,000 levels in a job's podTemplate, and Python's parser ends at about a thousand:
without the cut one tenant's job would end the watch, and with it the operator, for all of them.
"""

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import kopf

from fedpipe_api.names import JOBS

DEPTH = 64
"""Levels kept. A valid job has fewer, in its managedFields too, which mirror its podTemplate."""

_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{\]}]', re.DOTALL)


def shallow(text: bytes) -> bytes:
    """Return JSON text with null in place of every object and list below DEPTH levels."""
    depth = start = kept = 0
    parts: list[bytes] = []
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in (b"{", b"["):
            depth += 1
            if depth == DEPTH + 1:
                start = match.start()
        elif token in (b"}", b"]"):
            if depth == DEPTH + 1:
                parts += [text[kept:start], b"null"]
                kept = match.end()
            depth -= 1
    return b"".join((*parts, text[kept:])) if parts else text


def decode(text: bytes) -> Any:
    """Return what JSON text of the API server says, cut if it is too deep; ValueError if it is no JSON."""
    try:
        return json.loads(text)
    except RecursionError:
        return json.loads(shallow(text))


class _Lines:
    """A response's content whose lines are cut, for kopf's watch."""

    def __init__(self, content: aiohttp.StreamReader) -> None:
        self._content = content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._content, name)

    async def iter_chunked(self, size: int) -> AsyncIterator[bytes]:
        rest: list[bytes] = []
        async for data in self._content.iter_chunked(size):
            first, *lines = data.split(b"\n")
            rest.append(first)
            for line in lines:
                yield shallow(b"".join(rest)) + b"\n"
                rest = [line]


class _Response(aiohttp.ClientResponse):
    """An answer of the API server. Only jobs have fields without a schema, so that only theirs are cut."""

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        await super().start(connection)
        if self._is_of_jobs() and "watch" in self.url.query:
            self.content = _Lines(self.content)  # type: ignore[assignment]
        return self

    async def json(self, **_: Any) -> Any:
        body = await self.read()
        return json.loads(shallow(body) if self._is_of_jobs() else body)

    def _is_of_jobs(self) -> bool:
        return f"/{JOBS}" in self.url.path


class Login:
    """kopf's login, in a session whose answers are cut."""

    def __init__(self) -> None:
        self._known: tuple[kopf.ConnectionInfo, kopf.AiohttpSession] | None = None

    def __call__(self, **kwargs: Any) -> kopf.AiohttpSession | None:
        """Return the session for the ServiceAccount, or outside a cluster for the user's kubeconfig."""
        info = kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)
        if info is None:
            return None
        # The same session for the same credentials: kopf does not try again what was refused.
        if self._known is None or self._known[0] != info:
            session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ssl=info.as_ssl_context()),
                headers=info.as_http_headers(),
                proxy=info.proxy_url,
                trust_env=info.trust_env,
                response_class=_Response,
            )
            found = kopf.AiohttpSession(
                server=info.server,
                default_namespace=info.default_namespace,
                priority=info.priority,
                expiration=info.expiration,
                aiohttp_session=session,
            )
            self._known = (info, found)
        return self._known[1]
