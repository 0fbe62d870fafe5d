# SPDX-License-Identifier: Apache-2.0
"""Drives one job: performs what `decide` says, and records it."""

import asyncio
import logging

from fedpipe_api.base import UserError
from fedpipe_api.conditions import Reason
from fedpipe_api.status import Phase
from fedpipe_api.wire import Blob

from ..store import is_full
from .aggregation import aggregate
from .begin import NO_PATHS, adapter_of, converted
from .decide import Action, Aggregate, Begin, CloseRound, Finish, MakePlan, OpenRound, Wait, decide
from .integrity import Integrity
from .jobs import Job, until
from .journal import Journal
from .planning import PlanInfeasible, make_plan
from .privacy import BudgetSpent
from .records import Begun, Finished, Record, RoundClosed, RoundOpened, UpdateDropped
from .state import blobs_in_use, standing_updates
from .worker import Worker

log = logging.getLogger(__name__)

RETRY_SECONDS = 5.0
"""Pause before an action that failed is tried again; it doubles with each failure in a row."""

LONGEST_DOUBLING = 6
"""Doublings of that pause: 5 minutes 20 seconds at most."""


class Driver:
    """What drives every job: one task for each calls `drive`."""

    def __init__(
        self, journal: Journal, worker: Worker, integrity: Integrity, *, reads_paths: bool = False
    ) -> None:
        self._journal = journal
        self._worker = worker
        self._integrity = integrity
        self._reads_paths = reads_paths

    async def drive(self, job: Job) -> None:
        """Drive one job until it ends."""
        failures = 0
        while not job.state.finished:
            committed = job.committed.next
            try:
                await self._perform_or_end(job, committed)
                failures = 0
            except PlanInfeasible as error:
                await self._stand(job, Wait(Reason.PLAN_INFEASIBLE, str(error)), committed)
            except Exception as error:
                pause = RETRY_SECONDS
                if is_full(error):
                    log.warning("job %s: the store has no room; trying again", job.state.name)
                    job.set_store_full("what comes next")
                else:
                    # Longer each time: other jobs wait for the worker behind one that takes it and fails.
                    pause *= 2 ** min(failures, LONGEST_DOUBLING)
                    failures += 1
                    log.exception("job %s: will be tried again in %.0f s", job.state.name, pause)
                    text = f"{type(error).__name__}: {error}"[:900]
                    job.set_waiting(Wait(Reason.INTERNAL_ERROR, f"{text}; trying again"))
                await asyncio.sleep(pause)

    async def _perform_or_end(self, job: Job, committed: asyncio.Event) -> None:
        try:
            await self._perform(job, decide(job.state, self._journal.clock()), committed)
        except (UserError, BudgetSpent) as error:
            done = isinstance(error, BudgetSpent)
            end = Finished(
                phase=Phase.SUCCEEDED if done and job.state.done else Phase.FAILED,
                reason=Reason.PRIVACY_BUDGET_SPENT if done else Reason.INVALID,
                message=str(error)[:1024],
            )
            async with job.lock:
                await self._journal.commit(job, end)

    async def _stand(self, job: Job, wait: Wait, committed: asyncio.Event) -> None:
        if job.full:
            wait = Wait(Reason.STORE_FULL, job.full, wait.until)
        elif job.refused and wait.reason in (Reason.ROUND_OPEN, Reason.QUORUM_LOST):
            wait = Wait(Reason.STORE_FULL, next(iter(job.refused.values())), wait.until)
        elif job.damage:
            wait = Wait(Reason.STORE_DAMAGED, job.damage, wait.until)
        job.set_waiting(wait)
        await until(committed, None if wait.until is None else max(0.0, wait.until - self._journal.clock()))

    async def _perform(self, job: Job, action: Action, committed: asyncio.Event) -> None:
        match action:
            case Wait():
                await self._stand(job, action, committed)
            case MakePlan():
                record: Record = await make_plan(
                    self._worker, job.state, action.reason, unmeasured=action.unmeasured
                )
                async with job.lock:
                    await self._journal.commit(job, record)
            case Begin():
                await self._begin(job)
            case Aggregate():
                await self._aggregate(job, action.round, committed)
            case OpenRound() | CloseRound() | Finish():
                async with job.lock, self._journal.store_lock:
                    # Something may have been committed while we waited for the lock.
                    if decide(job.state, self._journal.clock()) == action:
                        before = blobs_in_use(job.state)
                        await self._journal.commit(job, self._record_of(job, action))
                        # Those updates of an open round that another plan does not ask for.
                        await self._journal.remove(before - blobs_in_use(job.state))

    def _record_of(self, job: Job, action: OpenRound | CloseRound | Finish) -> Record:
        state = job.state
        match action:
            case OpenRound():
                assert state.plan is not None
                current = state.rounds.get(action.round)
                return RoundOpened(
                    round=action.round,
                    plan=state.plan.version,
                    participants=tuple(sorted({*state.planned, *standing_updates(state, action.round)})),
                    deadline=self._journal.clock() + state.spec.rounds.deadline,
                    again=(current.opened.again or 0) + 1 if current else None,
                )
            case CloseRound():
                opened = state.rounds[action.round]
                missing = set(opened.opened.participants) - set(opened.updates)
                stragglers = {node: _steps_heard(job, node, action.round) for node in sorted(missing)}
                down, job.bytes_down = job.bytes_down, 0
                return RoundClosed(
                    round=action.round,
                    stragglers=stragglers,
                    bytes_down=down,
                    drops=sum(opened.drops.values()) or None,
                )
            case Finish():
                return Finished(phase=action.phase, reason=action.reason, message=action.message)

    async def _begin(self, job: Job) -> None:
        """Take in the adapter that the job starts from."""
        given = job.state.spec.adapter.from_
        assert given is not None
        if given.job is not None:
            async with job.lock, self._journal.store_lock:
                # With the lock held its file stays until the record says that this job needs it too.
                adapter = adapter_of(self._journal.jobs.values(), job.state)
                await self._journal.commit(job, Begun(adapter=adapter))
            return
        if not self._reads_paths:
            raise UserError(NO_PATHS)
        file = await converted(self._worker, self._journal.blobs, job.state)
        async with job.lock, self._journal.store_lock:
            await asyncio.to_thread(self._journal.blobs.adopt, file.path, file.digest)
            await self._journal.commit(job, Begun(adapter=Blob(digest=file.digest, size=file.size)))

    async def _aggregate(self, job: Job, round_number: int, committed: asyncio.Event) -> None:
        again = self._journal.clock() + RETRY_SECONDS
        if not await self._integrity.start_holds(job):
            return await self._stand(job, Wait(Reason.STORE_DAMAGED, job.damage or "", again), committed)
        job.set_waiting(Wait(Reason.AGGREGATING, f"round {round_number} is aggregated"))
        # Side by side, because reading all updates once more takes as long as a tenth of the round.
        damaged, made = await asyncio.gather(
            self._damaged(job),
            aggregate(self._worker, self._journal.blobs, job.state),
            return_exceptions=True,
        )
        if isinstance(damaged, BaseException):
            raise damaged
        if damaged:
            for path, _ in () if isinstance(made, BaseException) else made[1]:
                await asyncio.to_thread(path.unlink, missing_ok=True)
            return await self._drop(job, damaged)
        if isinstance(made, BaseException):
            raise made
        record, files = made
        async with job.lock, self._journal.store_lock:
            before = blobs_in_use(job.state)
            for path, digest in files:
                await asyncio.to_thread(self._journal.blobs.adopt, path, digest)
            await self._journal.commit(job, record)
            await self._journal.remove(before)
        return None

    async def _damaged(self, job: Job) -> list[str]:
        """Return the nodes whose updates of the closed round are damaged."""
        current = job.state.current
        assert current is not None
        updates = sorted(current.updates.items())
        intact = await asyncio.gather(*(self._integrity.is_intact(known.digest) for _, known in updates))
        return [node for (node, _), holds in zip(updates, intact, strict=True) if not holds]

    async def _drop(self, job: Job, nodes: list[str]) -> None:
        """Ask nodes again for their updates of the closed round."""
        current = job.state.current
        assert current is not None
        for node in nodes:
            async with job.lock:
                record = UpdateDropped(
                    round=current.opened.round,
                    node=node,
                    drops=current.drops.get(node, 0) + 1,
                    deadline=self._journal.clock() + job.state.spec.rounds.deadline,
                )
                await self._journal.commit(job, record)


def _steps_heard(job: Job, node: str, round_number: int) -> int:
    live = job.live.get(node)
    heard = live.progress if live else None
    return heard.step if heard and heard.round == round_number else 0
