# SPDX-License-Identifier: Apache-2.0
"""Who may read metrics and adapters: TokenReview and SubjectAccessReview, as in Kubernetes itself."""

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from fedpipe_api.names import ADAPTER_SUBRESOURCE, GROUP, JOBS, TOKEN_HEADER, VERSION

from ..engine import Refused
from .api import Api, ApiError
from .token_review import AT_ONCE, Decisions, Unauthenticated, review

KEEP_SECONDS = 10.0
"""How long a decision is kept, as kube-controller-manager and its like keep theirs."""

CACHE_SIZE = 1000

Right = Mapping[str, Any]

METRICS: Right = {"nonResourceAttributes": {"path": "/metrics", "verb": "get"}}


def adapter_right(namespace: str, job: str) -> Right:
    """Return what reading a job's adapter asks for: `get` on `fedpipejobs/adapter`."""
    return {
        "resourceAttributes": {
            "verb": "get",
            "group": GROUP,
            "version": VERSION,
            "resource": JOBS,
            "subresource": ADAPTER_SUBRESOURCE,
            "namespace": namespace,
            "name": job,
        }
    }


def bearer(request: web.Request) -> str:
    """Return the token of a request, empty without one.

    The API server's proxy takes Authorization off; a token that travels through it has its own header.
    """
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token if scheme == "Bearer" else request.headers.get(TOKEN_HEADER, "")


@dataclass(frozen=True)
class _Decision:
    refused: tuple[int, str, str] | None
    """Status, reason and text of a refusal."""


class Access:
    """Decides by asking the API server; a caller whose review fails is refused with 503."""

    def __init__(self, api: Api, clock: Callable[[], float] = time.monotonic) -> None:
        self._api = api
        self._clock = clock
        self._decisions = Decisions[_Decision](CACHE_SIZE)
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def check(self, token: str, audience: str | None, right: Right) -> None:
        """Return if the token's user has the right; Refused 401, 403 or 503 otherwise.

        Without an audience the token must be one for the API server.
        """
        if not token:
            raise Refused(401, "Unauthenticated", "no bearer token")
        text = json.dumps([token, audience, right], sort_keys=True)
        known = self._decisions.get(text, self._clock())
        if known is None:
            async with self._turns:
                known = _Decision(await self._decide(token, audience, right))
            until = self._clock() + KEEP_SECONDS
            self._decisions.keep(text, known, allowed=known.refused is None, until=until)
        if known.refused is not None:
            raise Refused(*known.refused)

    async def _decide(self, token: str, audience: str | None, right: Right) -> tuple[int, str, str] | None:
        try:
            user = await review(self._api, token, audience)
        except Unauthenticated as reason:
            return 401, "Unauthenticated", str(reason)
        try:
            allowed = await self._api.review_access(user, right)
        except ApiError as error:
            raise Refused(503, "ReviewFailed", str(error)) from None
        return None if allowed else (403, "Forbidden", f"{user.get('username')} cannot {_words(right)}")


def _words(right: Right) -> str:
    [what] = right.values()
    if "path" in what:
        return f"{what['verb']} {what['path']}"
    return f"{what['verb']} {what['resource']}/{what['subresource']} in namespace {what['namespace']}"
