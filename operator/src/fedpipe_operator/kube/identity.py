"""Who an agent is: its Pod's ServiceAccount token, checked by TokenReview and mapped to one (job, node)."""

import base64
import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedpipe_api.names import AUDIENCE, child_name

from ..coordinator import Identity
from ..engine import Refused
from .api import Api, ApiError
from .fields import Unreadable
from .views import PodView, pod_view

log = logging.getLogger(__name__)

CACHE_SECONDS = 600.0
"""A reviewed token is believed for at most so long, and never past its expiry."""

CACHE_SIZE = 10_000
REFUSED_SECONDS = 10.0
"""A refused token is not reviewed again, nor its reason logged again, for so long."""

TOKEN_BYTES = 16 * 1024
_POD_NAME = "authentication.kubernetes.io/pod-name"
_POD_UID = "authentication.kubernetes.io/pod-uid"


@dataclass(frozen=True)
class BoundPod:
    """The Pod that a token is bound to."""

    namespace: str
    name: str
    uid: str


class _Stranger(Exception):
    """Why a token stands for no agent."""


@dataclass(frozen=True)
class _Reviewed:
    found: BoundPod | str
    """The Pod, or why there is none."""
    until: float


class PodIdentities:
    """The coordinator's `Identify` in a cluster.

    `find` returns a Pod by (namespace, name) from the watch, `job_name` a job's name by its uid. A token
    stands for an agent only if it is bound to a Pod that a known FedPipeJob controls and that bears the one
    name which job and node give it.
    """

    def __init__(
        self,
        api: Api,
        find: Callable[[str, str], PodView | None],
        job_name: Callable[[str], str | None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._api = api
        self._find = find
        self._job_name = job_name
        self._clock = clock
        self._cache: OrderedDict[bytes, _Reviewed] = OrderedDict()
        self._told: dict[str, float] = {}

    async def __call__(self, token: str) -> Identity | None:
        """Return who presents the token; None, with the reason logged, for anybody else."""
        try:
            return await self._identify(token)
        except _Stranger as reason:
            self._log(str(reason))
            return None

    def _log(self, reason: str) -> None:
        """Say why once in a while: who is refused may come again at once."""
        now = self._clock()
        if now - self._told.get(reason, 0.0) >= REFUSED_SECONDS:
            if len(self._told) >= CACHE_SIZE:
                self._told.clear()
            self._told[reason] = now
            log.warning("an agent was refused: %s", reason)

    async def _identify(self, token: str) -> Identity:
        bound = await self._reviewed(token)
        pod = self._find(bound.namespace, bound.name)
        if pod is None or pod.uid != bound.uid:
            # The agent may be quicker than the watch.
            pod = await self._fetch(bound)
        if pod is None or pod.uid != bound.uid:
            raise _Stranger(f"Pod {bound.namespace}/{bound.name} of the token is gone or is no agent")
        job = self._job_name(pod.job)
        if job is None:
            raise _Stranger(f"Pod {bound.namespace}/{bound.name} belongs to a job that is gone")
        if pod.name != child_name(job, pod.node):
            raise _Stranger(f"Pod {bound.namespace}/{bound.name} is not the agent of {job} on {pod.node}")
        return Identity(pod.job, pod.node)

    async def _fetch(self, bound: BoundPod) -> PodView | None:
        try:
            body = await self._api.get_pod(bound.namespace, bound.name)
        except ApiError as error:
            raise Refused(503, "PodUnknown", str(error)) from None
        try:
            return None if body is None else pod_view(body)
        except Unreadable as error:
            raise _Stranger(f"Pod {bound.namespace}/{bound.name} cannot be read: {error}") from None

    async def _reviewed(self, token: str) -> BoundPod:
        if len(token) > TOKEN_BYTES:
            raise _Stranger("the token is too long")
        # Tokens themselves are kept nowhere.
        key, now = hashlib.sha256(token.encode()).digest(), self._clock()
        known = self._cache.get(key)
        if known is None or now >= known.until:
            known = await self._look(token, now)
            self._cache[key] = known
            self._cache.move_to_end(key)
            if len(self._cache) > CACHE_SIZE:
                self._cache.popitem(last=False)
        if isinstance(known.found, str):
            raise _Stranger(known.found)
        return known.found

    async def _look(self, token: str, now: float) -> _Reviewed:
        try:
            found = await self._review(token)
        except _Stranger as reason:
            return _Reviewed(str(reason), now + REFUSED_SECONDS)
        return _Reviewed(found, min(now + CACHE_SECONDS, _expiry(token)))

    async def _review(self, token: str) -> BoundPod:
        try:
            status = await self._api.review_token(token)
        except ApiError as error:
            # The agent is told to come again: a 5xx is retried, a 401 is not.
            raise Refused(503, "ReviewFailed", str(error)) from None
        if not status.get("authenticated"):
            raise _Stranger(f"TokenReview: {status.get('error') or 'not authenticated'}")
        if AUDIENCE not in (status.get("audiences") or ()):
            raise _Stranger(f"the token is not for audience {AUDIENCE}")
        user = status.get("user") or {}
        kind, _, account = str(user.get("username", "")).partition("system:serviceaccount:")
        extra: Mapping[str, Sequence[str]] = user.get("extra") or {}
        names, uids = extra.get(_POD_NAME) or (), extra.get(_POD_UID) or ()
        if kind or not account or len(names) != 1 or len(uids) != 1:
            raise _Stranger(f"the token of {user.get('username')} is not bound to a Pod")
        return BoundPod(account.partition(":")[0], names[0], uids[0])


def _expiry(token: str) -> float:
    """Return the `exp` claim of a token that the API server has verified; 0 where there is none to read."""
    try:
        payload = token.split(".", 2)[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return float(claims["exp"])
    except (IndexError, KeyError, TypeError, ValueError):
        return 0.0
