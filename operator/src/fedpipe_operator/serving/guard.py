# SPDX-License-Identifier: Apache-2.0
"""The outermost middleware of every server: what a client sends is refused in one line, never a traceback."""

import logging

from aiohttp import web
from aiohttp.http import HttpProcessingError
from aiohttp.typedefs import Handler

from fedpipe_api.wire import REGISTRATION_LIMIT, Refusal

from ..engine import Refused
from .connection import connection_of

log = logging.getLogger(__name__)


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer a request; a Refusal in JSON for what is refused."""
    connection = connection_of(request)
    if connection:
        chunked = REGISTRATION_LIMIT if request.can_read_body else 0
        connection.begin(chunked if request.content_length is None else request.content_length)
    try:
        _check_headers(request)
        return await handler(request)
    except Refused as refused:
        log.warning("%s %s: %d %s: %s", request.method, request.path, refused.status, refused.reason, refused)
        return _refuse(refused)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return _refuse(Refused(error.status, type(error).__name__.removeprefix("HTTP"), error.reason))
    except (web.RequestPayloadError, ConnectionError) as error:
        return _refuse(Refused(400, "Truncated", f"the body broke off: {error}"))
    finally:
        if connection:
            connection.end()


def _check_headers(request: web.Request) -> None:
    for name, value in request.headers.items():
        if not value.isascii():
            raise Refused(400, "BadRequest", f"header {name}: has bytes that are not ASCII")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Refused(415, "UnsupportedMediaType", "Content-Encoding: send the body as it is")
    try:
        # All that aiohttp reads by itself once a handler has returned; nothing else catches its errors there.
        _ = request.http_range
    except ValueError:
        raise Refused(416, "RangeNotSatisfiable", "Range: only bytes=FIRST-LAST is understood") from None
    try:
        _ = (request.if_modified_since, request.if_unmodified_since, request.if_range)
        _ = (request.if_match, request.if_none_match)
    except (ValueError, OverflowError, IndexError, TypeError):
        raise Refused(400, "BadRequest", "a conditional header cannot be read") from None


def _refuse(refused: Refused) -> web.Response:
    body = Refusal(reason=refused.reason, error=refused.message[:1024])
    response = web.json_response(text=body.to_json(), status=refused.status)
    if refused.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
        response.force_close()
    if refused.retry_after is not None:
        response.headers["Retry-After"] = str(refused.retry_after)
    return response


class _NoTracebacks(logging.Filter):
    """What a client sent is no fault of the server: one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        # The latter where a body that nobody wants breaks off after its request was answered.
        if isinstance(error, HttpProcessingError | web.RequestPayloadError):
            record.levelno, record.levelname = logging.INFO, "INFO"
            record.msg, record.args = f"{record.getMessage()}: %s", (" ".join(str(error).split())[:200],)
            record.exc_info = None
        return True


NO_TRACEBACKS = _NoTracebacks()
