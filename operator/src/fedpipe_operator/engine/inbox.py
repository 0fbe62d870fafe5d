# SPDX-License-Identifier: Apache-2.0
"""What agents send: each message is checked against the job's state, and recorded if it is new."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from fedpipe_api.conditions import Reason
from fedpipe_api.lora.format import HEADER_BYTES, update_shapes
from fedpipe_api.wire import (
    STARTING,
    AgentConfig,
    Assignment,
    Evaluation,
    ProfileReport,
    Progress,
    Registration,
    UpdateManifest,
)

from ..aggregate import InvalidUpdateFile, check_update_file
from ..store import Incoming
from . import accept
from .accept import Refused, Verdict
from .allowances import require_allowed
from .decide import Wait, assignment
from .integrity import Integrity
from .jobs import Job, Live, until
from .journal import Journal, gone
from .quota import held, quota, tenant_quota
from .records import AgentLost, AgentRegistered, Evaluated, Profiled, UpdateAccepted
from .shapes import digest_of

UPLOAD_SECONDS = 5
"""When an upload is welcome again that met another of its node's: that one has ended or broken off."""

ROOM_SECONDS = 30
"""When an upload is welcome again that found no room."""


DAMAGE_SECONDS = 60
"""When a download is welcome again whose file is damaged."""


class Inbox:
    """The agents' side of the engine (see coordinator/)."""

    def __init__(self, journal: Journal, integrity: Integrity) -> None:
        self._journal = journal
        self.integrity = integrity
        self.jobs = journal.jobs
        self.quarantined = journal.quarantined
        self.blobs = journal.blobs
        self.readers = journal.readers
        self.clock = journal.clock

    def job(self, uid: str) -> Job:
        """Return a job; Refused with 404 when it is gone, with 403 when it is quarantined."""
        try:
            return self.jobs[uid]
        except KeyError:
            pass
        if uid in self.quarantined:
            text = "the job is quarantined: its records are damaged; its status says what to do"
            raise Refused(403, "JobQuarantined", text)
        raise gone()

    def facts(self, uid: str, node: str) -> AgentConfig:
        """Return what an agent needs to load its model and data."""
        spec = self.job(uid).state.spec
        return AgentConfig(
            job=self.job(uid).state.name, node=node, model=spec.model, data=spec.data,
            optimizer=spec.optimizer, adapter=spec.adapter, privacy=spec.privacy,
            min_updates=spec.rounds.min_updates, seed=spec.seed,
        )  # fmt: skip

    def require_registration(self, uid: str, node: str) -> None:
        """Refuse a node that registers too often, before its message is read."""
        require_allowed(self.job(uid).registrations, node)

    async def register(self, uid: str, node: str, message: Registration) -> AgentConfig:
        """Take an agent in."""
        job = self.job(uid)
        async with job.lock:
            state = job.state
            if not state.finished and accept.registration(state, node, message) is Verdict.NEW:
                require_allowed(job.returns, node)
                await self._journal.commit(
                    job,
                    AgentRegistered(
                        sequence=state.sequence + 1,
                        node=node,
                        device=message.device,
                        samples=message.samples,
                        evaluation_samples=message.evaluation_samples,
                        notes=message.notes,
                        shape=(shape := digest_of(message.model)),
                        model=message.model if accept.brings_model(state, node, shape) else None,
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
            available = job.work_available.next
            work = assignment(job.state, node, self.clock())
            left = end - time.monotonic()
            if work is not None or left <= 0:
                return work
            await until(available, left)

    async def profile(self, uid: str, node: str, report: ProfileReport) -> None:
        """Take a node's measurements."""
        job = self.job(uid)
        async with job.lock:
            if accept.profile(job.state, node, report) is Verdict.NEW:
                await self._journal.commit(job, Profiled(node=node, report=report))

    async def evaluation(self, uid: str, node: str, message: Evaluation) -> None:
        """Take a node's evaluation."""
        job = self.job(uid)
        async with job.lock:
            if accept.evaluation(job.state, node, message) is Verdict.NEW:
                await self._journal.commit(job, Evaluated(node=node, evaluation=message))

    async def receive_update(
        self,
        uid: str,
        node: str,
        round_number: int,
        manifest: UpdateManifest,
        stream: AsyncIterator[bytes | bytearray],
    ) -> None:
        """Take an update in as its bytes arrive, and count it; return once it is counted, now or before.

        Nothing is read of an update that is not wanted, and no more of one that is wanted no longer: no quota
        counts the bytes of a job that has gone. `stream` may raise Refused as well.
        """
        state = self.job(uid).state
        if accept.update(state, node, round_number, manifest) is Verdict.KNOWN:
            return
        assert state.model is not None
        opened = state.rounds[round_number].opened
        ranks = state.plans[opened.plan].nodes[node].ranks
        shapes = update_shapes(state.model.matrices, state.model.head, ranks)
        limit = sum(4 * math.prod(shape) for shape in shapes.values()) + HEADER_BYTES
        if manifest.size > limit:
            text = f"the update of {node} may have at most {limit} bytes"
            raise accept.misfit(opened, Refused(413, "TooLarge", text))
        with self._receiving(uid, node, manifest.size):
            incoming = self.blobs.incoming()
            try:
                async for chunk in stream:
                    accept.update(self.job(uid).state, node, round_number, manifest)
                    await asyncio.to_thread(incoming.write, chunk)
                await _finish(incoming, manifest)
                try:
                    await asyncio.to_thread(check_update_file, incoming.path, shapes, limit)
                except InvalidUpdateFile as error:
                    refusal = Refused(422, error.reason, f"update of {node}: {error}")
                    raise accept.misfit(opened, refusal) from None
                await self._count(uid, node, round_number, manifest, incoming)
            finally:
                incoming.discard()

    async def _count(
        self, uid: str, node: str, round_number: int, manifest: UpdateManifest, incoming: Incoming
    ) -> None:
        """Count a checked, synced update: its blob first, then its record."""
        job = self.job(uid)
        async with job.lock:
            if accept.update(job.state, node, round_number, manifest) is Verdict.KNOWN:
                return
            async with self._journal.store_lock:
                self.job(uid)  # it may have been deleted while this message waited
                await asyncio.to_thread(self.blobs.adopt, incoming.path, manifest.digest)
                drops = job.state.rounds[round_number].drops.get(node)
                record = UpdateAccepted(round=round_number, node=node, manifest=manifest, drops=drops)
                await self._journal.commit(job, record)

    @contextlib.contextmanager
    def _receiving(self, uid: str, node: str, size: int) -> Iterator[None]:
        """Hold room for an update of the given bytes; Refused beside another of the node, or without room."""
        job = self.job(uid)
        if node in job.uploads:
            text = f"another update of {node} is on its way; send one at a time"
            raise Refused(429, "UploadInProgress", text, retry_after=UPLOAD_SECONDS)
        why = self._no_room(job, size)
        if why is not None:
            job.refused[node] = f"an update of {node} is refused: {why}; enlarge the volume"
            job.set_waiting(Wait(Reason.STORE_FULL, job.refused[node]))
            raise Refused(507, "QuotaExceeded", why, retry_after=ROOM_SECONDS)
        job.refused.pop(node, None)
        job.uploads[node] = size
        try:
            yield
        finally:
            del job.uploads[node]

    def _no_room(self, job: Job, size: int) -> str | None:
        """Return why an update of the given bytes finds no room, None if it does."""
        state, volume = job.state, self.blobs.volume()
        limit, taken = quota(state, volume), held(state) + sum(job.uploads.values())
        if taken + size > limit:
            return f"job {state.name} may hold {limit} bytes in the store and has {taken}"
        limit, taken = tenant_quota(volume), 0
        for other in self.jobs.values():
            if other.state.namespace == state.namespace:
                taken += held(other.state) + sum(other.uploads.values())
        if taken + size > limit:
            return f"all jobs of namespace {state.namespace} may hold {limit} bytes together and have {taken}"
        return None

    async def progress(self, uid: str, node: str, message: Progress) -> bool:
        """Note a sign of life; return whether the work is still wanted."""
        job = self.job(uid)
        if message.state == "failed":
            await self.mark_lost(uid, node, message.message or "the agent failed", failed=True)
            return False
        if message.state in STARTING:
            # A lost node's agent that starts is not back before it registers.
            job.live.setdefault(node, Live(self.clock())).progress = message
            job.shown.fire()
            return True
        await self._heard(job, node)
        if node in job.live:
            job.live[node].progress = message
        job.shown.fire()
        work = assignment(job.state, node, self.clock())
        return work is not None and (work.kind, work.round) == (message.kind, message.round)

    async def readable(self, uid: str, digest: str) -> Path:
        """Return the path of a blob of the job whose bytes were checked; Refused where they are damaged."""
        job = self.job(uid)
        if not await self.integrity.holds(job, digest):
            raise Refused(
                503, "StoreDamaged", job.damage or "the file is damaged", retry_after=DAMAGE_SECONDS
            )
        return self.blobs.path(digest)

    def full(self, uid: str, what: str) -> None:
        """Show that there was no room for what an agent sent; it sends it again."""
        if uid in self.jobs:
            self.jobs[uid].set_store_full(what)

    def sent(self, uid: str, size: int) -> None:
        """Count bytes that went down to an agent of the job."""
        self.job(uid).bytes_down += size

    async def _heard(self, job: Job, node: str) -> None:
        known = job.state.agents.get(node)
        job.live.setdefault(node, Live(self.clock())).seen = self.clock()
        if known is not None and node in job.state.lost:
            async with job.lock:
                require_allowed(job.returns, node)
                sequence = job.state.sequence + 1
                await self._journal.commit(
                    job, known.model_copy(update={"sequence": sequence, "model": None})
                )

    async def mark_lost(
        self, uid: str, node: str, reason: str, *, failed: bool = False, killed: bool = False
    ) -> None:
        """Say that a node's agent is gone, or `failed` with an error; rounds stop waiting for it.

        One that was `killed` because it used more memory than it may is planned with less.
        """
        job = self.job(uid)
        async with job.lock:
            state = job.state
            if node in state.offered and node not in state.lost and not state.finished:
                sequence = state.sequence + 1
                plan = state.plan.nodes.get(node) if state.plan else None
                record = AgentLost(
                    sequence=sequence,
                    node=node,
                    reason=reason[:1024],
                    failed=failed,
                    killed_bytes=plan.predicted_bytes if killed and plan else None,
                )
                await self._journal.commit(job, record)


async def _finish(incoming: Incoming, manifest: UpdateManifest) -> None:
    """Make a received file durable and check that it is what was announced."""
    digest = await asyncio.to_thread(incoming.finish)
    if incoming.size != manifest.size:
        raise Refused(400, "Truncated", f"{incoming.size} of {manifest.size} bytes arrived")
    if digest != manifest.digest:
        raise Refused(422, "DigestDiffers", "the body's sha256 is not the manifest's digest")
