# SPDX-License-Identifier: Apache-2.0
"""Who an agent is: its Pod's ServiceAccount token, checked by TokenReview and mapped to one (job, node)."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedpipe_api.names import AUDIENCE, child_name

from ..coordinator import Identity
from ..engine import Refused
from .api import Api, ApiError
from .fields import Unreadable
from .token_review import AT_ONCE, Decisions, Unauthenticated, expiry, review
from .views import PodView, own_pod_name, pod_view

log = logging.getLogger(__name__)

CACHE_SECONDS = 600.0
"""A reviewed token is believed for at most so long, and never past its expiry."""

CACHE_SIZE = 10_000
REFUSED_SECONDS = 10.0
"""A refused token is not reviewed again, nor its reason logged again, for so long."""

_EXTRA = "authentication.kubernetes.io/"


@dataclass(frozen=True)
class BoundPod:
    """The Pod that a token is bound to, as the API server signed it."""

    namespace: str
    name: str
    uid: str
    node: str
    """The node that the Pod was bound to; empty where the API server does not say."""


@dataclass(frozen=True)
class JobName:
    """What the ledger calls a job."""

    namespace: str
    name: str


class PodIdentities:
    """The coordinator's `Identify` in a cluster.

    `find` returns a Pod by (namespace, name) from the watch, `job_name` what the ledger calls a job, by its
    uid. A token stands for an agent only if it is bound to a Pod that lives in the namespace of the
    FedPipeJob that controls it, under the one name which job and node give it, on that node. All of it is
    looked at for every request; only what the token says of itself is kept.
    """

    def __init__(
        self,
        api: Api,
        find: Callable[[str, str], PodView | None],
        job_name: Callable[[str], JobName | None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._api = api
        self._find = find
        self._job_name = job_name
        self._clock = clock
        self._decisions = Decisions[BoundPod | str](CACHE_SIZE)
        """The Pod of a token, or why there is none."""
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._logged: dict[str, float] = {}

    async def __call__(self, token: str) -> Identity | None:
        """Return the agent that presents the token; None, with the reason logged, for anybody else."""
        try:
            pod, job = await self._pod(token)
            if not pod.bound or pod.node != pod.bound or pod.name != child_name(job.name, pod.bound):
                raise Unauthenticated(
                    f"Pod {pod.namespace}/{pod.name} on {pod.bound or 'no node'} is no agent"
                )
        except Unauthenticated as reason:
            self._log(str(reason))
            return None
        return Identity(pod.job, pod.bound)

    async def own_pod(self, component: str, token: str) -> str | None:
        """Return the uid of the job whose WRITER or TRACKER presents the token; None, logged, for others."""
        try:
            pod, job = await self._pod(token)
            if pod.name != own_pod_name(job.name, component):
                raise Unauthenticated(f"Pod {pod.namespace}/{pod.name} is not the {component} Pod of its job")
        except Unauthenticated as reason:
            self._log(str(reason))
            return None
        return pod.job

    def _log(self, reason: str) -> None:
        """Say why once in a while: whatever is refused may come again at once."""
        now = self._clock()
        if now - self._logged.get(reason, 0.0) >= REFUSED_SECONDS:
            if len(self._logged) >= CACHE_SIZE:
                self._logged.clear()
            self._logged[reason] = now
            log.warning("an agent was refused: %s", reason)

    async def _pod(self, token: str) -> tuple[PodView, JobName]:
        """Return the living Pod of a token and its job, which agree in all that both say."""
        bound = await self._reviewed(token)
        title = f"Pod {bound.namespace}/{bound.name}"
        pod = self._find(bound.namespace, bound.name)
        if pod is None or pod.uid != bound.uid or not pod.bound:
            # The agent may be quicker than the watch.
            pod = await self._fetch(bound)
        if pod is None or pod.uid != bound.uid:
            reason = f"{title} of the token is gone or is no agent"
            self._refuse(token, reason)
            raise Unauthenticated(reason)
        if not pod.running or (pod.until is not None and self._clock() >= pod.until):
            raise Unauthenticated(f"{title} has ended")
        if bound.node not in ("", pod.bound):
            raise Unauthenticated(f"{title} is not on the node that its token is for")
        job = self._job_name(pod.job)
        if job is None:
            raise Unauthenticated(f"{title} belongs to a job that is gone")
        if job != JobName(pod.namespace, pod.owner):
            raise Unauthenticated(
                f"{title} is not of the namespace and name of the job that it says it belongs to"
            )
        return pod, job

    async def _fetch(self, bound: BoundPod) -> PodView | None:
        try:
            body = await self._api.get_pod(bound.namespace, bound.name)
        except ApiError as error:
            raise Refused(503, "PodUnknown", str(error)) from None
        try:
            return None if body is None else pod_view(body)
        except Unreadable as error:
            raise Unauthenticated(f"Pod {bound.namespace}/{bound.name} cannot be read: {error}") from None

    async def _reviewed(self, token: str) -> BoundPod:
        found = self._decisions.get(token, self._clock())
        if found is None:
            async with self._turns:
                found = self._decisions.get(token, self._clock()) or await self._look(token)
        if isinstance(found, str):
            raise Unauthenticated(found)
        return found

    async def _look(self, token: str) -> BoundPod | str:
        now = self._clock()
        try:
            found = _bound_pod(await review(self._api, token, AUDIENCE))
        except Unauthenticated as reason:
            return self._refuse(token, str(reason))
        until = min(now + CACHE_SECONDS, expiry(token))
        self._decisions.keep(token, found, allowed=True, until=until)
        return found

    def _refuse(self, token: str, reason: str) -> str:
        self._decisions.keep(token, reason, allowed=False, until=self._clock() + REFUSED_SECONDS)
        return reason


def _bound_pod(user: Mapping[str, object]) -> BoundPod:
    kind, _, account = str(user.get("username", "")).partition("system:serviceaccount:")
    extra = user.get("extra")
    said = extra if isinstance(extra, Mapping) else {}
    name, uid, node = (_only(said.get(f"{_EXTRA}{what}")) for what in ("pod-name", "pod-uid", "node-name"))
    if kind or not account or not name or not uid:
        raise Unauthenticated(f"the token of {user.get('username')} is not bound to a Pod")
    return BoundPod(account.partition(":")[0], name, uid, node)


def _only(values: Sequence[str] | None) -> str:
    return values[0] if values is not None and len(values) == 1 else ""
