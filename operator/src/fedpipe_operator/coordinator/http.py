# SPDX-License-Identifier: Apache-2.0
"""Routes of the round protocol (see fedpipe_api.wire). Every call is idempotent."""

import asyncio
import contextlib
import logging
import re
import sqlite3
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from pathlib import Path
from typing import TypeVar

from aiohttp import web, web_fileresponse
from aiohttp.abc import AbstractStreamWriter
from aiohttp.typedefs import Handler, Middleware

from fedpipe_api.base import Model
from fedpipe_api.wire import (
    CONTROL_LIMIT,
    HEADER_LIMIT,
    MANIFEST_HEADER,
    REGISTRATION_LIMIT,
    Answer,
    BadMessage,
    Evaluation,
    ProfileReport,
    Progress,
    Registration,
    UpdateManifest,
    read_message,
)

from ..engine import Engine, Refused
from ..engine.readers import Readers
from ..engine.state import blobs_in_use
from ..store import is_full
from .bodies import Bodies, arriving
from .concurrency import Callers
from .identity import Identify, Identity

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Model)

LONGEST_WAIT = 60.0
"""Seconds that a long poll may ask for."""

FULL_SECONDS = 15
"""When a message is welcome again that found the store without room."""

_CHUNK = 128 * 1024
"""Bytes of a blob read at a time: each slow reader holds so many."""

LINK_PATH = "/v1/link"
"""Zeros for anyone who wants to know the rate of its link; a probe has no identity here."""

_LINK_BYTES = 1 << 18
_LINK_CHUNK = bytes(1 << 15)

_IDENTITY = web.RequestKey("identity", Identity)


def application(
    engine: Engine, identify: Identify, others: Mapping[str, Handler] | None = None
) -> web.Application:
    """Return the coordinator's aiohttp application; the caller owns server, socket and TLS.

    `others` are paths that are not for agents, each with a handler that finds out by itself who asks.
    """
    routes = _Routes(engine, identify)
    open_to_others = {LINK_PATH: _link} | dict(others or {})
    app = web.Application(
        middlewares=[
            _without_room(engine),
            _authentication(identify, frozenset(open_to_others.values())),
            _limited(Callers(lambda uid: engine.job(uid).state.namespace)),
        ],
        handler_args={"max_field_size": HEADER_LIMIT, "max_line_size": 8190},
    )
    app.add_routes(
        [
            *(web.get(path, handler) for path, handler in open_to_others.items()),
            web.get("/v1/job", routes.job),
            web.post("/v1/agents", routes.register),
            web.get("/v1/assignment", routes.assignment),
            web.post("/v1/profile", routes.profile),
            web.get("/v1/blobs/{digest}", routes.blob),
            web.post("/v1/rounds/{round}/evaluation", routes.evaluation),
            web.put("/v1/rounds/{round}/update", routes.update),
            web.post("/v1/progress", routes.progress),
        ]
    )
    return app


def _without_room(engine: Engine) -> Middleware:
    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except (OSError, sqlite3.Error) as error:
            if not is_full(error):
                raise
        identity = request.get(_IDENTITY)
        if identity is not None:
            engine.full(identity.job, f"what {identity.node} sent")
        text = "the operator's store has no room; try again later"
        raise Refused(507, "StoreFull", text, retry_after=FULL_SECONDS)

    return check


def _authentication(identify: Identify, others: Collection[Handler]) -> Middleware:
    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.match_info.handler in others:
            return await handler(request)
        request[_IDENTITY] = await _identified(request, identify)
        return await handler(request)

    return check


async def _identified(request: web.Request, identify: Identify) -> Identity:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    identity = await identify(token) if scheme == "Bearer" and token else None
    if identity is None:
        raise Refused(401, "Unauthenticated", "no valid bearer token")
    return identity


def _limited(callers: Callers) -> Middleware:
    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        who = request.get(_IDENTITY)
        if who is None:
            return await handler(request)
        with callers.calling(request, who):
            return await handler(request)

    return check


async def _link(request: web.Request) -> web.StreamResponse:
    # Piece by piece: a client that does not read must not hold all of it here.
    response = web.StreamResponse()
    response.content_length = _LINK_BYTES
    await response.prepare(request)
    for _ in range(_LINK_BYTES // len(_LINK_CHUNK)):
        await response.write(_LINK_CHUNK)
    return response


class _BlobResponse(web.FileResponse):
    """A blob, for as long as the job uses it."""

    def __init__(self, readers: Readers, path: Path) -> None:
        super().__init__(path, chunk_size=_CHUNK)
        self._readers = readers

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send it, and be cut off once the job needs it no more."""
        if not web_fileresponse.NOSENDFILE:
            # Plain HTTP, of one machine alone, has asyncio's sendfile, which outlives an aborted connection.
            return await super().prepare(request)
        with self._readers.reading(self._path.name, cutting_off(request)):
            return await super().prepare(request)


def cutting_off(request: web.BaseRequest) -> Callable[[], None]:
    """Return what ends the connection of a request at once."""

    def cut() -> None:
        if request.transport:
            request.transport.abort()

    return cut


class _Routes:
    def __init__(self, engine: Engine, identify: Identify) -> None:
        self._engine = engine
        self._bodies = Bodies()
        self._identify = identify

    async def _still(self, request: web.Request) -> None:
        """Refuse who has stopped being that agent while the request took its time."""
        if await _identified(request, self._identify) != request[_IDENTITY]:
            raise Refused(401, "Unauthenticated", "the token stands for another agent now")

    async def job(self, request: web.Request) -> web.Response:
        who = request[_IDENTITY]
        return _json(self._engine.facts(who.job, who.node))

    async def register(self, request: web.Request) -> web.Response:
        who = request[_IDENTITY]
        self._engine.require_registration(who.job, who.node)
        message = await self._body(request, Registration, REGISTRATION_LIMIT)
        return _json(await self._engine.register(who.job, who.node, message))

    async def assignment(self, request: web.Request) -> web.Response:
        who = request[_IDENTITY]
        try:
            seconds = min(max(0.0, float(request.query.get("wait", "0"))), LONGEST_WAIT)
        except ValueError:
            raise Refused(400, "BadRequest", "wait: a number of seconds is wanted") from None
        work = await self._engine.next_assignment(who.job, who.node, seconds)
        await self._still(request)
        return web.Response(status=204) if work is None else _json(work)

    async def profile(self, request: web.Request) -> web.Response:
        who = request[_IDENTITY]
        report = await self._body(request, ProfileReport, REGISTRATION_LIMIT)
        await self._engine.profile(who.job, who.node, report)
        return web.Response(status=204)

    async def evaluation(self, request: web.Request) -> web.Response:
        who = request[_IDENTITY]
        message = await self._body(request, Evaluation, CONTROL_LIMIT)
        if message.round != _round(request):
            raise Refused(400, "BadRequest", "round: the path and the body differ")
        await self._engine.evaluation(who.job, who.node, message)
        return web.Response(status=204)

    async def progress(self, request: web.Request) -> web.Response:
        who = request[_IDENTITY]
        message = await self._body(request, Progress, CONTROL_LIMIT)
        return _json(Answer(wanted=await self._engine.progress(who.job, who.node, message)))

    async def blob(self, request: web.Request) -> web.StreamResponse:
        who, digest = request[_IDENTITY], request.match_info["digest"]
        # Only what the job uses now: a name cannot lead to another job's files, nor out of the store.
        if digest not in blobs_in_use(self._engine.job(who.job).state):
            raise Refused(404, "BlobUnknown", "the job has no such blob")
        path = await self._engine.readable(who.job, digest)
        size = path.stat().st_size
        wanted = request.http_range
        self._engine.sent(who.job, max(0, size - (wanted.start or 0)))
        return _BlobResponse(self._engine.readers, path)

    async def update(self, request: web.Request) -> web.Response:
        who, number = request[_IDENTITY], _round(request)
        manifest = _manifest(request)
        async with contextlib.aclosing(self._upload(request, manifest.size)) as stream:
            await self._engine.receive_update(who.job, who.node, number, manifest, stream)
        return web.Response(status=204)

    async def _upload(self, request: web.Request, size: int) -> AsyncGenerator[bytearray]:
        """Yield an update in pieces worth a write; Refused once its sender is not that agent any more."""
        if request.content_length is None:
            raise Refused(411, "LengthRequired", "an update needs a Content-Length")
        if request.content_length > size:
            raise Refused(413, "TooLarge", f"the body has more than {size} bytes")
        if request.content_length < size:
            raise Refused(400, "SizeDiffers", "Content-Length is not the manifest's size")
        with self._bodies.uploading() as chunk_size:
            buffer = bytearray()
            async for chunk in arriving(request, size):
                buffer += chunk
                if len(buffer) >= chunk_size():
                    await self._still(request)
                    yield buffer
                    buffer = bytearray()
        await self._still(request)
        yield buffer

    async def _body(self, request: web.Request, kind: type[M], limit: int) -> M:
        too_large = Refused(413, "TooLarge", f"a {kind.__name__} may have at most {limit} bytes")
        size = limit if request.content_length is None else request.content_length
        if size > limit:
            raise too_large
        tenant = self._engine.job(request[_IDENTITY].job).state.namespace
        async with self._bodies.hold(tenant, size):
            body = bytearray()
            async for chunk in arriving(request, size):
                body += chunk
                if len(body) > limit:
                    raise too_large
            try:
                if len(body) <= CONTROL_LIMIT:
                    return read_message(kind, bytes(body))
                async with self._bodies.reading(tenant):
                    return await asyncio.to_thread(read_message, kind, bytes(body))
            except BadMessage as error:
                raise Refused(422, "Invalid", str(error)) from None


def _json(message: Model) -> web.Response:
    return web.json_response(text=message.to_json())


def _round(request: web.Request) -> int:
    text = request.match_info["round"]
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise Refused(404, "RoundUnknown", "a round is a number")
    return int(text)


def _manifest(request: web.Request) -> UpdateManifest:
    text = request.headers.get(MANIFEST_HEADER)
    if text is None:
        raise Refused(400, "BadRequest", f"header {MANIFEST_HEADER} is missing")
    try:
        return read_message(UpdateManifest, text)
    except BadMessage as error:
        raise Refused(422, "Invalid", f"{MANIFEST_HEADER}: {error}") from None
