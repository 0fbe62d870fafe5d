"""Drives jobs: performs what `decide` says, records it, and accepts what agents send."""

import asyncio
import contextlib
import errno
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from fedpipe_api.base import UserError
from fedpipe_api.conditions import Reason
from fedpipe_api.job import FedPipeJob, FedPipeJobSpec
from fedpipe_api.status import Phase
from fedpipe_api.wire import (
    Assignment,
    Evaluation,
    ProfileReport,
    Progress,
    Registered,
    Registration,
    UpdateManifest,
)

from ..store import Blobs, Entry, Incoming, Ledger
from . import accept
from .accept import Refused, Verdict
from .aggregation import aggregate
from .decide import (
    Action,
    Aggregate,
    CloseRound,
    Finish,
    MakePlan,
    OpenRound,
    Wait,
    assignment,
    decide,
)
from .jobs import Job, Live
from .notes import Note, note_of
from .planning import Infeasible, make_plan
from .records import (
    ADAPTER,
    AgentLost,
    AgentRegistered,
    Evaluated,
    Finished,
    Offered,
    Profiled,
    Record,
    RoundClosed,
    RoundOpened,
    SpecChanged,
    Submitted,
    UpdateAccepted,
)
from .state import apply, blobs_in_use, submitted
from .worker import Worker

log = logging.getLogger(__name__)
T = TypeVar("T")

SILENCE_SECONDS = 60.0
"""An agent that has not called for so long is lost; agents call at least every 30 seconds."""

RETRY_SECONDS = 5.0
"""Pause before an action that failed is tried again."""

# After these records an agent may have new work.
_TURNS = ("spec", "offered", "plan", "opened", "aggregated", "finished")


class Engine:
    """All jobs of one store. Call from one event loop; nothing here blocks it."""

    def __init__(
        self,
        directory: Path,
        *,
        clock: Callable[[], float] = time.time,
        notify: Callable[[str, Note], None] = lambda uid, note: None,
    ) -> None:
        self.jobs: dict[str, Job] = {}
        self.clock = clock
        self._notify = notify
        self._ledger = Ledger(directory / "ledger.sqlite")
        self.blobs = Blobs(directory / "blobs")
        self._threads = ThreadPoolExecutor(1, "ledger")
        self._worker = Worker()
        # Held while a blob and the record that names it come to be, and while unused blobs are removed.
        self._store_lock = asyncio.Lock()
        self._watch: asyncio.Task[None] | None = None

    # Life

    async def start(self) -> None:
        """Take up every job of the ledger where it stopped."""
        for entry in await self._in_ledger(lambda: list(self._ledger.replay())):
            record = ADAPTER.validate_json(entry.body)
            if isinstance(record, Submitted):
                self.jobs[entry.job] = Job(submitted(entry.job, record, entry.at))
            else:
                apply(self.jobs[entry.job].state, record, entry.at)
        await asyncio.to_thread(self.blobs.keep_only, self._in_use())
        self._worker.start()
        for job in self.jobs.values():
            self._run(job)
        self._watch = asyncio.create_task(self._watch_silence())

    async def stop(self) -> None:
        """Stop driving; everything that matters is in the store already."""
        tasks = [job.task for job in self.jobs.values()] + [self._watch]
        for task in tasks:
            if task:
                task.cancel()
        await asyncio.gather(*(task for task in tasks if task), return_exceptions=True)
        await asyncio.to_thread(self._worker.stop)
        self._threads.shutdown()
        self._ledger.close()

    def _run(self, job: Job) -> None:
        now = self.clock()
        # An agent that was there before a restart gets the full time to call again.
        job.live = {node: Live(now) for node in job.state.agents}
        job.task = asyncio.create_task(self._drive(job), name=f"drive {job.state.name}")

    def _in_use(self) -> set[str]:
        return {digest for job in self.jobs.values() for digest in blobs_in_use(job.state)}

    async def _in_ledger(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def _commit(self, job: Job, record: Record) -> None:
        at = self.clock()
        entry = Entry(job.state.uid, record.key, at, record.to_json())
        await self._in_ledger(partial(self._ledger.append, entry))
        apply(job.state, record, at)
        job.wait = None
        note = note_of(job.state, record)
        if note:
            self._notify(job.state.uid, note)
        job.committed.fire()
        job.shown.fire()
        if record.kind in _TURNS:
            job.turned.fire()

    # What the runner of the fleet says: kube/ or local/

    async def submit(self, job: FedPipeJob) -> None:
        """Take a job in by its metadata.uid, or its edited spec if it is known. Idempotent."""
        meta = job.metadata
        if meta.uid is None:
            raise ValueError("a job needs a uid")
        generation = meta.generation or 1
        known = self.jobs.get(meta.uid)
        if known is None:
            record = Submitted(namespace=meta.namespace, name=meta.name, generation=generation, spec=job.spec)
            entry = Entry(meta.uid, record.key, self.clock(), record.to_json())
            await self._in_ledger(partial(self._ledger.append, entry))
            self.jobs[meta.uid] = Job(submitted(meta.uid, record, entry.at))
            self._run(self.jobs[meta.uid])
            return
        async with known.lock:
            if known.state.spec != job.spec and not known.state.finished:
                await self._commit(known, SpecChanged(generation=generation, spec=job.spec))

    async def change(self, uid: str, spec: FedPipeJobSpec) -> None:
        """Change a job's spec where no API server counts its generations (the local run)."""
        job = self.jobs[uid]
        async with job.lock:
            if job.state.spec != spec:
                await self._commit(job, SpecChanged(generation=job.state.generation + 1, spec=spec))

    async def offer(self, uid: str, nodes: Iterable[str], excluded: dict[str, str] | None = None) -> None:
        """Say which nodes may take part, and why others may not. Idempotent."""
        job, names = self.jobs[uid], tuple(sorted(nodes))
        async with job.lock:
            state = job.state
            if (names, excluded or {}) != (state.offered, state.excluded) and not state.finished:
                record = Offered(sequence=state.sequence + 1, nodes=names, excluded=excluded or {})
                await self._commit(job, record)

    async def lose(self, uid: str, node: str, reason: str) -> None:
        """Say that a node's agent is gone; rounds stop waiting for it."""
        job = self.jobs[uid]
        async with job.lock:
            state = job.state
            if node in state.offered and node not in state.lost and not state.finished:
                record = AgentLost(sequence=state.sequence + 1, node=node, reason=reason[:1024])
                await self._commit(job, record)

    async def delete(self, uid: str) -> None:
        """Forget a job: its records and blobs."""
        job = self.jobs.pop(uid, None)
        if job is None:
            return
        if job.task:
            job.task.cancel()
            await asyncio.gather(job.task, return_exceptions=True)
        job.turned.fire()
        job.shown.fire()
        async with self._store_lock:
            await self._in_ledger(partial(self._ledger.forget, uid))
            await self._remove(blobs_in_use(job.state))

    async def moved(self, uid: str, seconds: float) -> None:
        """Return when the job changed, or after the given seconds."""
        await _until(self.jobs[uid].shown.next, seconds)

    # What agents say (coordinator/)

    def job(self, uid: str) -> Job:
        """Return a job; Refused with 404 when it is gone."""
        try:
            return self.jobs[uid]
        except KeyError:
            raise Refused(404, "JobUnknown", "the job is gone") from None

    def facts(self, uid: str, node: str) -> Registered:
        """Return what an agent needs to load its model and data."""
        spec = self.job(uid).state.spec
        return Registered(
            job=self.job(uid).state.name, node=node, model=spec.model, data=spec.data,
            optimizer=spec.optimizer, adapter=spec.adapter, seed=spec.seed,
        )  # fmt: skip

    async def register(self, uid: str, node: str, message: Registration) -> Registered:
        """Take an agent in."""
        job = self.job(uid)
        async with job.lock:
            state = job.state
            if not state.finished and accept.registration(state, node, message) is Verdict.NEW:
                await self._commit(
                    job,
                    AgentRegistered(
                        sequence=state.sequence + 1,
                        node=node,
                        device=message.device,
                        samples=message.samples,
                        evaluation_samples=message.evaluation_samples,
                        model=message.model if state.model is None else None,
                    ),
                )
        job.live[node] = Live(self.clock())
        return self.facts(uid, node)

    async def next_assignment(self, uid: str, node: str, seconds: float) -> Assignment | None:
        """Return the node's work as soon as there is some; None after the given seconds."""
        end = time.monotonic() + seconds
        # Once: that somebody still waits here says nothing of an agent that has died meanwhile.
        await self._heard(self.job(uid), node)
        while True:
            job = self.job(uid)
            turned = job.turned.next
            work = assignment(job.state, node, self.clock())
            left = end - time.monotonic()
            if work is not None or left <= 0:
                return work
            await _until(turned, left)

    async def profile(self, uid: str, node: str, report: ProfileReport) -> None:
        """Take a node's measurements."""
        job = self.job(uid)
        async with job.lock:
            if accept.profile(job.state, node, report) is Verdict.NEW:
                await self._commit(job, Profiled(node=node, report=report))

    async def evaluation(self, uid: str, node: str, message: Evaluation) -> None:
        """Take a node's evaluation."""
        job = self.job(uid)
        async with job.lock:
            if accept.evaluation(job.state, node, message) is Verdict.NEW:
                await self._commit(job, Evaluated(node=node, evaluation=message))

    async def update(
        self, uid: str, node: str, round_number: int, manifest: UpdateManifest, incoming: Incoming
    ) -> None:
        """Count a checked, synced update: its blob first, then its record; only then answer the agent."""
        job = self.job(uid)
        async with job.lock:
            if accept.update(job.state, node, round_number, manifest) is Verdict.KNOWN:
                return
            async with self._store_lock:
                await asyncio.to_thread(self.blobs.adopt, incoming.path, manifest.digest)
                record = UpdateAccepted(round=round_number, node=node, manifest=manifest)
                await self._commit(job, record)

    async def progress(self, uid: str, node: str, message: Progress) -> bool:
        """Note a sign of life; return whether the work is still wanted."""
        job = self.job(uid)
        if message.state == "failed":
            await self.lose(uid, node, message.message or "the agent failed")
            return False
        await self._heard(job, node)
        if node in job.live:
            job.live[node].progress = message
        job.shown.fire()
        work = assignment(job.state, node, self.clock())
        return work is not None and (work.kind, work.round) == (message.kind, message.round)

    def sent(self, uid: str, size: int) -> None:
        """Count bytes that went down to an agent of the job."""
        self.job(uid).bytes_down += size

    async def _heard(self, job: Job, node: str) -> None:
        known = job.state.agents.get(node)
        job.live.setdefault(node, Live(self.clock())).seen = self.clock()
        if known is not None and node in job.state.lost:
            async with job.lock:
                sequence = job.state.sequence + 1
                await self._commit(job, known.model_copy(update={"sequence": sequence, "model": None}))

    # Driving

    async def _drive(self, job: Job) -> None:
        while not job.state.finished:
            committed = job.committed.next
            try:
                await self._perform(job, decide(job.state, self.clock()), committed)
            except Infeasible as error:
                await self._stand(job, Wait(Reason.PLAN_INFEASIBLE, str(error)), committed)
            except UserError as error:
                async with job.lock:
                    await self._commit(
                        job, Finished(phase=Phase.FAILED, reason=Reason.INVALID, message=str(error)[:1024])
                    )
            except Exception as error:
                full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
                log.exception("job %s: will be tried again", job.state.name)
                reason = Reason.STORE_FULL if full else Reason.AGGREGATING
                job.stand(Wait(reason, f"{type(error).__name__}: {error}; trying again"))
                await asyncio.sleep(RETRY_SECONDS)

    async def _stand(self, job: Job, wait: Wait, committed: asyncio.Event) -> None:
        job.stand(wait)
        await _until(committed, None if wait.until is None else max(0.0, wait.until - self.clock()))

    async def _perform(self, job: Job, action: Action, committed: asyncio.Event) -> None:
        match action:
            case Wait():
                await self._stand(job, action, committed)
            case MakePlan():
                record: Record = await make_plan(self._worker, job.state, action.reason)
                async with job.lock:
                    await self._commit(job, record)
            case Aggregate():
                await self._aggregate(job, action.round)
            case OpenRound() | CloseRound() | Finish():
                async with job.lock:
                    # Something may have been committed while we waited for the lock.
                    if decide(job.state, self.clock()) == action:
                        await self._commit(job, self._record_of(job, action))

    def _record_of(self, job: Job, action: OpenRound | CloseRound | Finish) -> Record:
        state = job.state
        match action:
            case OpenRound():
                assert state.plan is not None
                return RoundOpened(
                    round=action.round,
                    plan=state.plan.version,
                    participants=state.planned,
                    deadline=self.clock() + state.spec.rounds.deadline,
                )
            case CloseRound():
                opened = state.rounds[action.round]
                missing = set(opened.opened.participants) - set(opened.updates)
                stragglers = {node: _steps_heard(job, node, action.round) for node in sorted(missing)}
                down, job.bytes_down = job.bytes_down, 0
                return RoundClosed(round=action.round, stragglers=stragglers, bytes_down=down)
            case Finish():
                return Finished(phase=action.phase, reason=action.reason, message=action.message)

    async def _aggregate(self, job: Job, round_number: int) -> None:
        job.stand(Wait(Reason.AGGREGATING, f"round {round_number} is aggregated"))
        record, files = await aggregate(self._worker, self.blobs, job.state)
        async with job.lock, self._store_lock:
            before = blobs_in_use(job.state)
            for path, digest in files:
                await asyncio.to_thread(self.blobs.adopt, path, digest)
            await self._commit(job, record)
            await self._remove(before)

    async def _remove(self, digests: set[str]) -> None:
        """Remove those blobs that no job uses any more; the caller holds the store lock."""
        for digest in digests - self._in_use():
            await asyncio.to_thread(self.blobs.remove, digest)

    async def _watch_silence(self) -> None:
        while True:
            await asyncio.sleep(SILENCE_SECONDS / 6)
            for uid, job in list(self.jobs.items()):
                late = self.clock() - SILENCE_SECONDS
                for node in job.state.live:
                    if not job.state.finished and job.live.setdefault(node, Live(self.clock())).seen < late:
                        text = f"no sign of life for {SILENCE_SECONDS:.0f} s"
                        with contextlib.suppress(KeyError):
                            await self.lose(uid, node, text)


def _steps_heard(job: Job, node: str, round_number: int) -> int:
    live = job.live.get(node)
    heard = live.progress if live else None
    return heard.step if heard and heard.round == round_number else 0


async def _until(event: asyncio.Event, seconds: float | None) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
