# SPDX-License-Identifier: Apache-2.0
"""Performs what `reconcile` says: one task per job looks, acts, and looks again when something changed."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from functools import partial

from pydantic import ValidationError

from fedpipe_api.base import UserError, explain
from fedpipe_api.conditions import Reason
from fedpipe_api.job import FedPipeJob
from fedpipe_api.status import FedPipeJobStatus

from ..engine import Engine, JobEvent
from ..engine.background import cancel
from ..engine.begin import NO_PATHS
from ..engine.state import JobState
from .api import Api, ApiError, Document
from .events import EventRecorder
from .inventory import Inventory
from .job_status import invalid_status, job_status, quarantined_status
from .output_delivery import OutputDelivery
from .pod_creation import PodCreation
from .pod_resizing import resize_pods
from .pod_warnings import PodWarnings
from .pods import owner_reference, template_digest
from .reconcile import Actions, as_recorded, reconcile
from .settings import OperatorSettings
from .tracked_job import TrackedJob
from .tracking import JobTracking, refusal
from .verified_precisions import VerifiedPrecisions
from .views import TRACKER, Body, PodView

log = logging.getLogger(__name__)

PACE_SECONDS = 0.5
"""Pause between a change and the look at it, so that many changes at once cost one look."""

LONGEST_PAUSE = 10.0
"""Every job that has not ended is looked at at least so often, whatever happens."""

ENDED_PAUSE = 300.0
"""And every other: a tenant may keep thousands, and no other job may wait behind looks at them."""

CONFLICT_SECONDS = 5.0
"""Pause before a status that the API server did not take is written again."""


class Controller:
    """All jobs.

    `publish_ca` is `Authority.publish`, `write_output` delivers an adapter and
    returns where it is stored, `observe` receives each reconcile's duration in seconds.
    """

    def __init__(
        self,
        engine: Engine,
        api: Api,
        settings: OperatorSettings,
        events: EventRecorder,
        *,
        publish_ca: Callable[..., Awaitable[None]],
        write_output: Callable[[FedPipeJob, JobState], Awaitable[str]],
        observe: Callable[[float], None] = lambda seconds: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.engine = engine
        self.jobs: dict[str, TrackedJob] = {}
        self._titles: dict[str, str] = {}
        self._namespaces: dict[str, dict[str, TrackedJob]] = {}
        self.inventory = Inventory(self.wake_all, self.wake, clock)
        self.last_look = time.monotonic()
        self._api = api
        self._settings = settings
        self._events = events
        self._publish_ca = publish_ca
        self._outputs = OutputDelivery(engine, events, write_output)
        self._observe = observe
        self._clock = clock
        self._tracking = JobTracking(api, settings, events, self.inventory, clock)
        self._proofs = VerifiedPrecisions()
        self._warnings = PodWarnings(api, clock)
        self._pods = PodCreation(
            api, settings, events, self.inventory, publish_ca=self._publish_to, clock=clock
        )
        self._turn = asyncio.Lock()

    # What kopf's handlers say

    def see_job(self, body: Body) -> None:
        """Take in a job as the API server has it now."""
        meta = body["metadata"]
        if "deletionTimestamp" in meta:
            return
        uid, generation = str(meta["uid"]), int(meta["generation"])
        known = self.jobs.get(uid)
        if known is None:
            known = self.jobs[uid] = TrackedJob.of(body)
            self._titles[uid] = known.title
            self._namespaces.setdefault(known.namespace, {})[uid] = known
        elif known.generation == generation:
            known.changed.set()
            return
        known.generation, known.refused = generation, None
        try:
            known.job = FedPipeJob.model_validate(
                {k: body[k] for k in ("apiVersion", "kind", "metadata", "spec") if k in body}
            )
            known.invalid = self._not_allowed(known)
        except ValidationError as error:
            known.invalid = explain(error)
        known.changed.set()
        if known.task is None:
            known.task = self.engine.background.tend("tend", known.title, partial(self._drive, known))

    def _not_allowed(self, known: TrackedJob) -> str | None:
        """Return why the administrator does not allow a job; one that runs already goes on to its end."""
        if known.job is None or known.uid in self.engine.jobs:
            return None
        given, output = known.job.spec.adapter.from_, known.job.spec.output
        if given is not None and given.path is not None:
            return NO_PATHS
        tracking = known.job.spec.tracking
        if tracking is not None and (refused := refusal(tracking, self._settings)) is not None:
            return refused
        if output is None or output.url is None:
            return None
        try:
            self._settings.store_of(output.url)
        except UserError as error:
            return str(error)
        return None

    async def forget_job(self, uid: str) -> None:
        """Remove what belongs to a job that is being deleted: Pods, then its rows and blobs. Idempotent."""
        known = self.jobs.get(uid)
        if known is not None:
            await cancel([known.task, known.output_task])
        ledger = self.engine.jobs.get(uid)
        namespace = known.namespace if known else ledger.state.namespace if ledger else ""
        for pod in self.inventory.pods_of(namespace, uid):
            await self._api.delete_pod(pod.namespace, pod.name, pod.uid, force=False)
        self._warnings.forget(uid)
        self._untrack(uid, namespace)
        if self._namespaces.get(namespace):
            await self._hand_on(namespace)
        await self.engine.delete(uid)
        if self.inventory.hold(uid, ()):
            self.wake_all()

    async def _hand_on(self, namespace: str) -> None:
        """Give what all jobs of a namespace share to the next: it goes with the job that owns it."""
        try:
            await self._publish_to(namespace)
        except ApiError as error:
            # The namespace itself may be on its way out, and takes nothing new.
            if not error.permanent:
                raise

    async def _publish_to(self, namespace: str, *, again: bool = False) -> None:
        """Publish the CA where a job's agents find it."""
        await self._publish_ca(namespace, self._owner(namespace), again=again)

    def _untrack(self, uid: str, namespace: str) -> None:
        self.jobs.pop(uid, None)
        self._titles.pop(uid, None)
        others = self._namespaces.get(namespace, {})
        others.pop(uid, None)
        if not others:
            self._namespaces.pop(namespace, None)

    def _owner(self, namespace: str) -> Document:
        """Return the reference to the job that owns what all jobs of a namespace share: the first known.

        One alone: with one for each of ten thousand jobs an object is larger than the API server takes.
        """
        first = next(iter(self._namespaces[namespace].values()))
        return owner_reference(first.name, first.uid) | {"controller": False, "blockOwnerDeletion": False}

    def wake(self, uid: str) -> None:
        """Have a job looked at."""
        if uid in self.jobs:
            self.jobs[uid].changed.set()

    def wake_all(self) -> None:
        """Have every job that may want nodes looked at, in the order they were submitted."""
        for known in self.jobs.values():
            if not self._has_ended(known):
                known.changed.set()

    def age(self) -> float:
        """Return the seconds since the last look at any job; 0 where none needs one every few seconds."""
        busy = any(not self._has_ended(known) for known in self.jobs.values())
        return time.monotonic() - self.last_look if busy else 0.0

    def _has_ended(self, known: TrackedJob) -> bool:
        engine_job = self.engine.jobs.get(known.uid)
        return engine_job is not None and engine_job.state.finished is not None

    def record_event(self, uid: str, event: JobEvent) -> None:
        """Post an event of the engine as an Event."""
        if uid in self.jobs:
            known = self.jobs[uid]
            self._events.record(known.namespace, known.name, uid, event)

    async def stop(self) -> None:
        """Stop looking."""
        tasks = [task for known in self.jobs.values() for task in (known.task, known.output_task)]
        await cancel(tasks)

    # One job

    async def _drive(self, known: TrackedJob) -> None:
        while True:
            known.changed.clear()
            events = [known.changed]
            if known.uid in self.engine.jobs:
                # Records, not every sign of life of every agent.
                events.append(self.engine.jobs[known.uid].committed.next)
            async with self._turn:
                # All jobs may be woken at once; between two looks the event loop does what else is due.
                await asyncio.sleep(0)
            started = time.perf_counter()
            try:
                again = await self._look(known)
                known.failures = 0
                # Not of a look that fails: an operator all of whose looks fail is stuck.
                self.last_look = time.monotonic()
            except ApiError as error:
                log.warning("job %s: %s; trying again", known.title, error)
                known.failures += 1
                again = min(2.0**known.failures, 30.0)
            except Exception:
                log.exception("job %s: will be looked at again", known.title)
                known.failures += 1
                again = min(2.0**known.failures, 30.0)
            self._observe(time.perf_counter() - started)
            longest = ENDED_PAUSE if self._has_ended(known) else LONGEST_PAUSE
            await _any_of(events, longest if again is None else min(again, longest))
            await asyncio.sleep(PACE_SECONDS)

    async def _look(self, known: TrackedJob) -> float | None:
        """Take the steps that are due and write the status; return the seconds until the next look is due."""
        job = known.job
        if job is None or known.invalid is not None:
            text = known.invalid or ""
            status = invalid_status(text, known.generation, known.budget.written, self._clock())
            return await self._write(known, status)
        if known.uid in self.engine.quarantined:
            return await self._quarantine(known, job)
        if await self._warnings.ask(known.uid, self.inventory.pods_of(known.namespace, known.uid)):
            # It may be the CA that they wait for: anybody may have deleted it.
            await self._publish_to(known.namespace, again=True)
        actions = self._decide(known, job)
        if actions.submit and not await self.engine.submit(job):
            log.warning("job %s: it is edited too often; generation %d waits", known.title, known.generation)
            job = as_recorded(job, self.engine.job(known.uid).state)
            actions = self._decide(known, job)
        log.debug("job %s: %s", known.title, actions)
        if await self._change_engine(known, actions):
            known.changed.set()
            return 0.0
        await self._prove(known)
        for removal in actions.remove:
            pod = removal.pod
            log.info("job %s: Pod %s is deleted: %s", known.title, pod.name, removal.reason)
            await self._api.delete_pod(pod.namespace, pod.name, pod.uid, removal.force)
        await resize_pods(self._api, known, actions.resize)
        again = await self._pods.create(known, job, actions.create)
        if actions.delete_job:
            log.info("job %s is deleted: ttlSecondsAfterFinished has passed", known.title)
            await self._api.delete_job(known.namespace, known.name, known.uid)
        self._outputs.deliver(known, job)
        await self._track(known, job)
        return _soonest(actions.again, again, await self._write_status(known, job))

    async def _quarantine(self, known: TrackedJob, job: FedPipeJob) -> float | None:
        """Say that the job stands still, and end its agents: they have no work, and hold memory and GPUs."""
        found = self.engine.quarantined[known.uid]
        if not known.quarantined:
            known.quarantined = True
            text = f"record {found.key}: {found.reason}"
            self._events.record(
                known.namespace, known.name, known.uid, JobEvent(True, Reason.QUARANTINED, text)
            )
        for pod in self.inventory.agents_of(known.namespace, known.uid):
            if not pod.deleting:
                await self._api.delete_pod(pod.namespace, pod.name, pod.uid, force=False)
        status = quarantined_status(found, job, known.budget.written, self._clock())
        return await self._write(known, status)

    async def _track(self, known: TrackedJob, job: FedPipeJob) -> None:
        engine_job = self.engine.jobs.get(known.uid)
        if engine_job is not None:
            tracker = self.inventory.own_pod(job.metadata, TRACKER)
            trouble = self._warnings.of(tracker) if tracker else None
            await self._tracking.tend(known, job, engine_job.state, trouble)

    def _decide(self, known: TrackedJob, job: FedPipeJob) -> Actions:
        """Decide and take hold of GPU nodes with nothing in between, so that no two jobs take the same."""
        engine_job = self.engine.jobs.get(known.uid)
        actions = reconcile(
            job,
            self.inventory.fleet_for(known.uid, self._titles),
            self._agents(known),
            engine_job.state if engine_job else None,
            seen={node: live.seen for node, live in engine_job.live.items()} if engine_job else {},
            template=template_digest(job, self._settings),
            now=self._clock(),
        )
        if actions.choice is not None:
            known.choice = actions.choice
        if actions.hold is not None and self.inventory.hold(known.uid, actions.hold):
            self.wake_all()
        return actions

    def _agents(self, known: TrackedJob) -> list[PodView]:
        """Return the job's agent Pods, with what is known of their failures, and why some do not start."""
        found = map(known.with_history, self.inventory.agents_of(known.namespace, known.uid))
        return [replace(pod, trouble=pod.trouble or self._warnings.of(pod)) for pod in found]

    async def _change_engine(self, known: TrackedJob, actions: Actions) -> bool:
        """Return whether the engine's state changed, so that everything must be decided again."""
        for node, reason in actions.lost.items():
            await self.engine.mark_lost(known.uid, node, reason, killed=node in actions.killed)
        if actions.eligible is not None:
            await self.engine.set_eligible_nodes(
                known.uid, actions.eligible.nodes, dict(actions.eligible.excluded)
            )
        return bool(actions.submit or actions.lost or actions.eligible)

    async def _prove(self, known: TrackedJob) -> None:
        """Record the kernels that ran on each node in its FedPipeNode, for people and for its probe."""
        engine_job = self.engine.jobs.get(known.uid)
        if engine_job is None:
            return
        for proof in self._proofs.due(engine_job.state, self._states, self.inventory.capacities):
            try:
                await self._api.apply_precisions(proof.node, proof.precisions())
            except ApiError as error:
                log.warning("FedPipeNode %s: %s; trying again", proof.node, error)
            else:
                self._proofs.recorded(proof)

    def _states(self) -> Iterable[JobState]:
        return (job.state for job in self.engine.jobs.values())

    # Its status

    async def _write_status(self, known: TrackedJob, job: FedPipeJob) -> float | None:
        engine_job = self.engine.jobs.get(known.uid)
        if engine_job is None:
            return None
        status = job_status(
            job,
            engine_job,
            pods=self._agents(known),
            choice=known.choice,
            refused=known.refused,
            output=known.output,
            tracking=known.tracking,
            previous=known.budget.written,
            now=self._clock(),
        )
        return await self._write(known, status)

    async def _write(self, known: TrackedJob, status: FedPipeJobStatus) -> float | None:
        delay = known.budget.delay(status, self._clock())
        if delay is None or delay > 0:
            return delay
        try:
            await self._api.apply_status(known.namespace, known.name, known.uid, status.to_dict())
        except ApiError as error:
            if error.status not in (404, 409):
                raise
            # Deleted, or another job of that name: kopf will say so. If not, nothing else may ever
            # have a job that ended looked at again.
            return CONFLICT_SECONDS
        known.budget.wrote(status, self._clock())
        return None


def _soonest(*delays: float | None) -> float | None:
    return min((delay for delay in delays if delay is not None), default=None)


async def _any_of(events: list[asyncio.Event], seconds: float) -> None:
    """Return when one of the events is set, or after the given seconds."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
