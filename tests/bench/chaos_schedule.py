# SPDX-License-Identifier: Apache-2.0
"""One schedule of faults: an engine on a store of its own, nodes that work, and what happens between."""

import asyncio
import contextlib
import errno
import random
import shutil
import sqlite3
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos_faults import FAULTS, Direct, Kill
from chaos_witness import LATER, Broken, Witness, copy_store, digest_of, make_old, set_version

from fedpipe_api.base import UserError
from fedpipe_api.conditions import Reason
from fedpipe_api.wire import Assignment, AssignmentKind, Evaluation, Precision, ProfileReport
from fedpipe_operator.engine import Engine, Refused
from fedpipe_operator.engine.jobs import Job
from fedpipe_operator.engine.records import Record
from fedpipe_operator.engine.state import JobState, blobs_in_use
from fedpipe_operator.engine.status import status
from fedpipe_operator.store import Entry, is_full
from fedpipe_operator.store.ledger import SCHEMA
from standins.agents import make_update, manifest_of, model_shape, registration
from standins.server import UID, job

SHAPE = model_shape(2)
NODES = ["node-0", "node-1", "node-2"]
COUNT, LONGEST = 3, 5
PATIENCE = 60.0
"""Seconds for what takes a fraction of one: the machine may be busy."""


async def _stream(content: bytes) -> AsyncIterator[bytes]:
    yield content


@dataclass
class Chaos:
    """One process's part of a schedule. `store` is a link, so that a crash can put a copy there in one step."""

    store: Path
    chance: random.Random
    witness: Witness
    kill: Kill | None = None
    now: float = 1_700_000_000.0
    full: bool = False
    slow: float = 0.0
    engine: Engine = field(init=False)

    # The engine's life

    async def start(self) -> None:
        """Open the store with a new engine, and see that all is there that was."""
        engine = self.engine = Engine(self.store.resolve(), clock=lambda: self.now)
        engine._worker = engine._driver._worker = engine.integrity._worker = Direct()
        self.watch(engine)
        self.witness.compare(list(engine._journal._ledger.replay()))
        await engine.start()
        if engine.quarantined:
            raise Broken(f"quarantined: {engine.quarantined}")
        if self.state is not None:
            for digest in blobs_in_use(self.state):
                if not engine.blobs.path(digest).exists():
                    raise Broken(f"file {digest[:12]} is lost")
        if self.witness.spec is not None:
            await self.submit()

    def watch(self, engine: Engine) -> None:
        """Let the faults, the kill and the witness see what the engine does."""
        journal, blobs = engine._journal, engine.blobs
        ledger = journal._ledger
        append, forget, incoming, adopt = ledger.append, ledger.forget, blobs.incoming, blobs.adopt
        remove, apply, opened = blobs.remove, journal._apply, journal.open

        def appended(entry: Entry) -> None:
            self.reach("append")
            self.need_room()
            append(entry)
            time.sleep(self.slow)
            self.reach("appended")

        def forgotten(uid: str) -> None:
            self.witness.say("forgetting", True)
            self.reach("forget")
            try:
                self.need_room()
                forget(uid)
            except sqlite3.Error:
                self.witness.say("forgetting", False)
                raise
            self.reach("forgot")
            self.witness.say("forgot")

        def received() -> Any:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return incoming()

        def adopted(path: Path, digest: str) -> Path:
            self.reach("adopt")
            found = adopt(path, digest)
            self.reach("adopted")
            return found

        def removed(digest: str) -> None:
            self.reach("remove")
            remove(digest)

        def applied(known: Job, record: Record, at: float) -> None:
            apply(known, record, at)
            self.witness.say("record", [record.key, digest_of(known.state)])

        async def open_job(uid: str, record: Any) -> Job:
            found = await opened(uid, record)
            if not self.witness.records:
                self.witness.say("record", [record.key, digest_of(found.state)])
            return found

        ledger.append, ledger.forget = appended, forgotten  # type: ignore[method-assign]
        blobs.incoming, blobs.adopt, blobs.remove = received, adopted, removed  # type: ignore[method-assign]
        journal._apply, journal.open = applied, open_job  # type: ignore[method-assign]

    def reach(self, place: str) -> None:
        """Be at a place where this process may be killed."""
        if self.kill:
            self.kill.reach(place, self.witness)

    def need_room(self) -> None:
        """Raise what SQLite raises on a full disk, while it is full."""
        if self.full:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error

    @property
    def state(self) -> JobState | None:
        """The job's state, None while it is deleted."""
        known = self.engine.jobs.get(UID)
        return known.state if known else None

    # What people and nodes do

    @contextlib.contextmanager
    def tolerant(self) -> Iterator[None]:
        """Let pass what callers try again: a refusal with a reason, a full disk."""
        try:
            yield
        except Refused as refused:
            if refused.status >= 500 and refused.reason not in ("StoreFull", "StoreDamaged"):
                raise
            self.witness.say("done", f"refused {refused.reason}")
        except (OSError, sqlite3.Error) as error:
            if not is_full(error):
                raise
            self.witness.say("done", "full answered")

    async def submit(self) -> None:
        """Have the job in the engine, with its nodes, as the reconciler does again and again."""
        assert self.witness.spec is not None
        with self.tolerant():
            await self.engine.submit(self.witness.spec)
            await self.engine.set_eligible_nodes(UID, NODES)

    async def edit(self, **changed: Any) -> None:
        """Change the spec in the API server, and submit it."""
        before = self.witness.spec
        assert before is not None
        meta = before.metadata.model_copy(update={"generation": (before.metadata.generation or 1) + 1})
        spec = before.spec.model_copy(update=changed)
        after = before.model_copy(update={"spec": spec, "metadata": meta})
        self.witness.say("spec", after.to_dict())
        await self.submit()

    async def work(self, node: str) -> None:
        """Do what an agent does between two calls."""
        state = self.state
        if state is None:
            return await self.submit()
        with self.tolerant():
            if node not in state.agents and not state.finished and not state.spec.suspend:
                await self.engine.register(UID, node, registration(SHAPE))
            task = await self.engine.next_assignment(UID, node, 0)
            if task is not None:
                await self.answer(node, task)
        return None

    async def answer(self, node: str, task: Assignment) -> None:
        """Answer an assignment."""
        state = self.state
        if state is None:
            return None
        if task.kind is AssignmentKind.PROFILE:
            assert task.plan is not None
            scores = {m.name: 1.0 for m in SHAPE.matrices}
            report = ProfileReport(
                step_seconds=0.01, peak_bytes=1 << 20, micro_batch=task.plan.micro_batch, scores=scores
            )
            return await self.engine.profile(UID, node, report)
        if task.kind is AssignmentKind.EVALUATE or (task.kind is AssignmentKind.TRAIN and task.evaluate):
            message = Evaluation(
                round=task.round if task.kind is AssignmentKind.EVALUATE else task.round - 1,
                samples=10, tokens=10, loss_sum=1.0, correct=0, precision=Precision.FP32,
            )  # fmt: skip
            await self.engine.evaluation(UID, node, message)
        if task.kind is AssignmentKind.TRAIN:
            await self.deliver(node, task)
        return None

    async def deliver(self, node: str, task: Assignment) -> None:
        """Send an update, and note that it was accepted."""
        assert task.plan is not None
        state = self.state
        content = make_update(SHAPE, task.plan, node, task.round)
        manifest = manifest_of(content, task.plan, task.round, task.adapter)
        await self.engine.receive_update(UID, node, task.round, manifest, _stream(content))
        # Nothing comes between the engine's answer and this: the job is that of the update, or is gone.
        if self.state is state:
            self.witness.say("answered", [node, task.round, manifest.digest])

    # Faults

    async def fault(self, kind: str) -> None:
        """Do one thing of the schedule."""
        node = self.chance.choice(NODES)
        self.witness.say("done", kind)
        self.reach("step")
        match kind:
            case "work":
                await self.work(node)
            case "all":
                await asyncio.gather(*map(self.work, NODES))
            case "cancel":
                await self.cancel()
            case "crash":
                await self.crash()
            case "full":
                self.full = not self.full
            case "clock":
                self.now += self.chance.choice([-3600.0, -1.0, 5.0, 90.0, 86400.0])
            case "slow":
                self.slow = 0.0 if self.slow else 0.005
            case "delete":
                await asyncio.gather(*map(self.work, NODES), self.delete(self.chance.uniform(0, 0.004)))
            case "suspend" | "edit":
                await asyncio.gather(self.work(node), self.change(kind))
            case "later version" | "older version":
                await self.roll(kind)
            case "lose":
                with self.tolerant():
                    await self.engine.mark_lost(UID, node, "gone")
            case "damage":
                self.damage()
        await asyncio.sleep(self.chance.choice([0.0, 0.0, 0.001, 0.004]))

    async def cancel(self) -> None:
        """Break off, once or twice, what nodes and the reconciler have begun."""
        calls = [*map(self.work, NODES), self.change("edit")]
        if self.chance.random() < 0.3:
            calls.append(self.delete(0))
        tasks = [asyncio.create_task(call) for call in calls]
        for _ in range(2):
            await asyncio.sleep(self.chance.uniform(0, 0.003))
            for task in tasks:
                task.cancel()
        for found in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(found, Exception):
                raise found

    async def delete(self, seconds: float) -> None:
        """Delete the job after a moment in which its nodes send."""
        await asyncio.sleep(seconds)
        with self.tolerant():
            await self.engine.delete(UID)

    async def change(self, kind: str) -> None:
        """Suspend, resume or change the number of rounds."""
        assert self.witness.spec is not None
        spec = self.witness.spec.spec
        if kind == "suspend":
            await self.edit(suspend=not spec.suspend)
        else:
            count = self.chance.randint(COUNT, LONGEST)
            await self.edit(rounds=spec.rounds.model_copy(update={"count": count}))

    async def crash(self) -> None:
        """Leave the engine as it stands, and go on with its files as they are now."""
        before, after = self.store.resolve(), Path(tempfile.mkdtemp(dir=self.store.parent)) / "store"
        # In the ledger's thread while the loop waits: nobody writes a record meanwhile, nor says that he has.
        self.engine._journal._threads.submit(copy_store, before, after).result()
        known = len(self.witness.records)
        await self.engine.stop()
        self.witness.say("rewound", known)
        link = after.with_name("link")
        link.symlink_to(after)
        link.replace(self.store)
        shutil.rmtree(before.parent)
        await self.start()

    async def roll(self, kind: str) -> None:
        """Roll to a later version that changes the schema and back, or forward from one before this."""
        await self.engine.stop()
        path = self.store / "ledger.sqlite"
        if kind == "older version":
            make_old(path)
        else:
            set_version(path, LATER)
            before = path.read_bytes()
            try:
                Engine(self.store)
            except UserError:
                pass
            else:
                raise Broken("a ledger of a later version was opened")
            if path.read_bytes() != before:
                raise Broken("a refused ledger was changed")
            set_version(path, SCHEMA)
        await self.start()

    def damage(self) -> None:
        """Flip a bit of an update in the store, as a disk does."""
        state = self.state
        current = state.current if state else None
        # Once the round is closed the bytes may have been checked and be in use.
        if current is None or current.closed is not None or not current.updates:
            return
        node = self.chance.choice(sorted(current.updates))
        path = self.engine.blobs.path(current.updates[node].digest)
        self.witness.say("done", "damaged")
        self.witness.say("damaged", [node, current.opened.round])
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    # What must hold

    async def check_reason(self) -> None:
        """The job ends, or stands soon and its status says why; what all jobs depend on runs."""
        end = time.monotonic() + PATIENCE
        while (known := self.engine.jobs.get(UID)) is not None and known.wait is None:
            if known.state.finished:
                break
            if time.monotonic() > end or known.task is None or known.task.done():
                raise Broken("the job stands without a reason")
            await asyncio.sleep(0.001)
        if known is not None and not status(known.state, known.wait, {}).message:
            raise Broken("the status gives no reason")
        background = self.engine.background
        ended = [
            kind for kind, state in background._states.items() if state.task is None or state.task.done()
        ]
        if ended or background.dead():
            raise Broken(f"dead: {ended + background.dead()}")

    async def conclude(self) -> JobState:
        """With all faults over and all nodes at work the job ends well; return how."""
        self.full, self.slow = False, 0.0
        await self.check_reason()
        await self.edit(suspend=False)
        end = time.monotonic() + PATIENCE
        while self.state is None or not self.state.finished:
            if time.monotonic() > end:
                here = self.engine.jobs.get(UID)
                shown = status(here.state, here.wait, {}).message if here else "no job"
                raise Broken(f"the job does not end: {shown}")
            await asyncio.gather(*map(self.work, NODES))
            self.now += 1
            await asyncio.sleep(0.001)
        if self.state.finished.reason != Reason.ROUNDS_COMPLETED:
            raise Broken(f"ended with {self.state.finished.reason}: {self.state.finished.message}")
        await self.check_reason()
        await self.engine.stop()
        await self.start()
        assert self.state is not None
        return self.state

    async def run(self, steps: int) -> None:
        """Take the store up, and do so many steps."""
        await self.start()
        if self.witness.spec is None:
            self.witness.say("spec", job(self.chance.choice([2, 3, 3]), COUNT).to_dict())
            await self.submit()
        for _ in range(steps):
            await self.fault(self.chance.choice(FAULTS))
            if self.chance.random() < 0.1:
                await self.check_reason()
