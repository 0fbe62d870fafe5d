# SPDX-License-Identifier: Apache-2.0
"""What the API server says of a bearer token: TokenReview, for callers of the operator."""

import base64
import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from ..engine import Refused
from .api import Api, ApiError
from .fields import one_line

V = TypeVar("V")

TOKEN_BYTES = 16 * 1024

AT_ONCE = 10
"""Reviews under way at a time; the others wait, so that nobody floods the API server through the operator."""


class Unauthenticated(Exception):
    """A token is not accepted; says why."""


async def review(api: Api, token: str, audience: str | None) -> Mapping[str, Any]:
    """Return the user of a token as the API server knows them: username, uid, groups, extra.

    Without an audience the token must be one for the API server itself. Unauthenticated says why it is
    refused; Refused 503 means that nobody could be asked.
    """
    if not 0 < len(token) <= TOKEN_BYTES or not (token.isascii() and token.isprintable()):
        raise Unauthenticated("the token is empty, too long or no printable ASCII")
    try:
        status = await api.review_token(token, audience)
    except ApiError as error:
        # The caller may come again: a 5xx is retried, a 401 is not.
        raise Refused(503, "ReviewFailed", str(error)) from None
    if not status.get("authenticated"):
        raise Unauthenticated(f"TokenReview: {one_line(str(status.get('error') or 'not authenticated'))}")
    if audience is not None and audience not in (status.get("audiences") or ()):
        raise Unauthenticated(f"the token is not for audience {audience}")
    return status.get("user") or {}


def expiry(token: str) -> float:
    """Return the `exp` claim of a token that the API server has verified; 0 where there is none to read."""
    try:
        payload = token.split(".", 2)[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return float(claims["exp"])
    except (IndexError, KeyError, TypeError, ValueError):
        return 0.0


class Decisions(Generic[V]):
    """What was decided of some text with a token in it, each for a while. The text itself is kept nowhere.

    Refusals are kept apart: who makes up tokens pushes out no decision on a caller that is let in.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept = {allowed: OrderedDict[bytes, tuple[V, float]]() for allowed in (True, False)}

    def get(self, text: str, now: float) -> V | None:
        """Return the decision that is in force."""
        key = _key(text)
        for kept in self._kept.values():
            if key in kept and now < kept[key][1]:
                return kept[key][0]
        return None

    def keep(self, text: str, value: V, *, allowed: bool, until: float) -> None:
        """Keep a decision in place of the one before."""
        key = _key(text)
        for kept in self._kept.values():
            kept.pop(key, None)
        kept = self._kept[allowed]
        kept[key] = value, until
        if len(kept) > self._size:
            kept.popitem(last=False)


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()
