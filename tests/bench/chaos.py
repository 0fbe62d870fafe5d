"""Random schedules of faults over the real store: no accepted update lost or doubled, no job stuck without a reason.

Each schedule is drawn from its number and the seed. It runs an engine in a process of this one on a store of its
own, with nodes that work between the faults. A crash leaves the engine as it stands and opens the files as they
are at that moment; `--kills` of the schedules run in a process that is killed with SIGKILL instead.

    python tests/bench/chaos.py --schedules 1000 --seed 1 --out tests/bench/results/chaos.json
"""

import argparse
import asyncio
import contextlib
import errno
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_machine import machine

from fedpipe_api.conditions import Reason
from fedpipe_api.job import FedPipeJob
from fedpipe_api.wire import Assignment, AssignmentKind, Evaluation, Precision, ProfileReport
from fedpipe_operator.engine import Engine, Refused, driver
from fedpipe_operator.engine.quarantine import fold
from fedpipe_operator.engine.state import JobState
from fedpipe_operator.engine.status import status
from fedpipe_operator.engine.worker import Worker
from fedpipe_operator.store import Entry, Ledger, is_full
from standins.agents import make_update, manifest_of, model_shape, registration
from standins.server import UID, job

SHAPE = model_shape(2)
NODES = ["node-0", "node-1", "node-2"]
COUNT = 3
FAULTS = ("work",) * 10 + (
    "crash",
    "full",
    "clock",
    "slow",
    "delete",
    "suspend",
    "edit",
    "version",
    "lose",
    "damage",
)

# What neither moves the store nor counts the job's generations, which the killed process takes with it.
KILLED = tuple(kind for kind in FAULTS if kind not in ("crash", "delete", "suspend", "edit", "version"))


class Direct(Worker):
    """Computes in a thread: a process for each of a thousand schedules would cost more than all they do."""

    def start(self) -> None:
        """Nothing to start."""

    def stop(self) -> None:
        """Nothing to end."""

    async def run(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the call returns."""
        return await asyncio.to_thread(call, *args, **kwargs)


class Stood(Exception):
    """A rule was broken; the message says which."""


@dataclass
class Chaos:
    """One schedule: its store, its faults and what was answered with success."""

    directory: Path
    chance: random.Random
    now: float = 1_700_000_000.0
    full: bool = False
    slow: float = 0.0
    generation: int = 1
    answered: dict[tuple[str, int], str] = field(default_factory=dict)
    dropped: set[tuple[str, int]] = field(default_factory=set)
    done: Counter[str] = field(default_factory=Counter)
    engine: Engine | None = None
    spec: FedPipeJob = field(default_factory=lambda: job(len(NODES), COUNT))

    async def start(self) -> Engine:
        """Open the store with a new engine, as after a restart."""
        engine = Engine(self.directory, clock=lambda: self.now)
        engine._worker = engine._driver._worker = engine.integrity._worker = Direct()
        append, incoming = engine._journal._ledger.append, engine.blobs.incoming

        def appended(entry: Entry) -> None:
            if self.full:
                error = sqlite3.OperationalError("database or disk is full")
                error.sqlite_errorcode = sqlite3.SQLITE_FULL
                raise error
            append(entry)
            if self.slow:
                time.sleep(self.slow)

        def received() -> Any:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return incoming()

        engine._journal._ledger.append = appended  # type: ignore[method-assign]
        engine.blobs.incoming = received  # type: ignore[method-assign]
        await engine.start()
        if engine.quarantined:
            raise Stood(f"quarantined: {engine.quarantined}")
        self.engine = engine
        return engine

    async def crash(self) -> None:
        """Leave the engine as it stands, and open its files as they are now."""
        assert self.engine is not None
        engine, state = self.engine, self.state
        copy = self.directory.parent / f"store-{self.done['crash']}"
        await asyncio.to_thread(copy_store, self.directory, copy)
        await engine.stop()
        shutil.rmtree(self.directory)
        self.directory = copy
        again = (await self.start()).jobs.get(UID)
        if state is not None and again is None:
            raise Stood("the job is lost")
        self.check_answered()

    @property
    def state(self) -> JobState | None:
        """The job's state, None while it is deleted."""
        assert self.engine is not None
        known = self.engine.jobs.get(UID)
        return known.state if known else None

    async def submit(self) -> None:
        """Have the job in the engine, with its nodes."""
        assert self.engine is not None
        with contextlib.suppress(OSError, sqlite3.Error):
            await self.engine.submit(self.spec)
            await self.engine.offer(UID, NODES)

    async def work(self, node: str) -> None:
        """Do what an agent does between two calls."""
        assert self.engine is not None
        engine = self.engine
        try:
            state = self.state
            if state is None:
                return await self.submit()
            if node not in state.agents and not state.finished and not state.spec.suspend:
                await engine.register(UID, node, registration(SHAPE))
            task = await engine.next_assignment(UID, node, 0)
            if task is not None:
                await self.do(node, task)
        except Refused as refused:
            if refused.status >= 500 and refused.reason not in ("StoreFull", "StoreDamaged"):
                raise
            self.done[f"refused {refused.reason}"] += 1
        except (OSError, sqlite3.Error) as error:
            if not is_full(error):
                raise
            self.done["full answered"] += 1
        return None

    async def do(self, node: str, task: Assignment) -> None:
        """Answer an assignment."""
        assert self.engine is not None
        engine, state = self.engine, self.state
        assert state is not None
        evaluated = task.round if task.kind is AssignmentKind.EVALUATE else task.round - 1
        if task.kind is AssignmentKind.PROFILE:
            scores = {m.name: 1.0 for m in SHAPE.matrices}
            report = ProfileReport(
                step_seconds=0.01, peak_bytes=1 << 20, micro_batch=task.plan.micro_batch, scores=scores
            )
            return await engine.profile(UID, node, report)
        if task.kind is AssignmentKind.EVALUATE or (task.kind is AssignmentKind.TRAIN and task.evaluate):
            agent = state.agents[node]
            message = Evaluation(
                round=evaluated, samples=agent.evaluation_samples, tokens=agent.evaluation_samples,
                loss_sum=1.0, correct=0, precision=Precision.FP32,
            )  # fmt: skip
            await engine.evaluation(UID, node, message)
        if task.kind is not AssignmentKind.TRAIN:
            return None
        assert task.plan is not None
        content = make_update(SHAPE, task.plan, node, task.round)
        manifest = manifest_of(content, task.plan, task.round, task.adapter)
        incoming = engine.blobs.incoming()
        try:
            incoming.write(content)
            incoming.finish()
            await engine.update(UID, node, task.round, manifest, incoming)
        finally:
            incoming.discard()
        known = self.state
        if known is not None and known is state:
            self.answered[node, task.round] = manifest.digest
        return None

    def check_answered(self) -> None:
        """Every update that was answered with success is in the ledger, once; raises Stood."""
        state = self.state
        if state is None:
            return
        for (node, number), digest in self.answered.items():
            known = state.rounds.get(number)
            if known is None:
                raise Stood(f"round {number} is lost with the update of {node}")
            found = known.updates.get(node)
            if found is None and not known.drops.get(node):
                raise Stood(f"the update of {node} for round {number} is lost")
            if found is not None and found.digest != digest:
                raise Stood(f"round {number} has another update of {node}")

    async def fault(self, kind: str) -> None:
        """Do one thing of the schedule."""
        assert self.engine is not None
        engine, node = self.engine, self.chance.choice(NODES)
        self.done[kind] += 1
        match kind:
            case "work":
                await self.work(node)
            case "crash":
                await self.crash()
            case "full":
                self.full = not self.full
            case "clock":
                self.now += self.chance.choice([-3600.0, -1.0, 5.0, 90.0, 86400.0])
            case "slow":
                self.slow = 0.0 if self.slow else 0.005
            case "delete":
                await self.delete()
            case "suspend" | "edit":
                await self.edit(kind)
            case "version":
                await self.roll_back()
            case "lose":
                with contextlib.suppress(Refused, OSError, sqlite3.Error):
                    await engine.lose(UID, node, "gone")
            case "damage":
                self.damage()
        await asyncio.sleep(self.chance.choice([0.0, 0.001, 0.01]))

    async def delete(self) -> None:
        """Delete the job while its nodes send."""
        assert self.engine is not None
        await asyncio.gather(*(self.work(node) for node in NODES), self.engine.delete(UID))
        if self.state is None:
            self.answered.clear()
        elif self.state.submitted_at == self.now:
            self.answered = {k: v for k, v in self.answered.items() if k[1] in self.state.rounds}

    async def edit(self, kind: str) -> None:
        """Suspend, resume or change the number of rounds."""
        assert self.engine is not None
        self.generation += 1
        spec = self.spec.spec
        if kind == "suspend":
            spec = spec.model_copy(update={"suspend": not spec.suspend})
        else:
            rounds = spec.rounds.model_copy(update={"count": self.chance.randint(COUNT, COUNT + 2)})
            spec = spec.model_copy(update={"rounds": rounds})
        meta = self.spec.metadata.model_copy(update={"generation": self.generation})
        self.spec = self.spec.model_copy(update={"spec": spec, "metadata": meta})
        await self.submit()

    async def roll_back(self) -> None:
        """Roll to a later version that changes the schema, back to this one, and forward again: untouched."""
        assert self.engine is not None
        await self.engine.stop()
        path = self.directory / "ledger.sqlite"
        version = set_version(path, 99)
        before = path.read_bytes()
        with contextlib.suppress(Exception):
            Engine(self.directory)
            raise SystemExit("a ledger of a later version was opened")
        if path.read_bytes() != before:
            raise Stood("a refused ledger was changed")
        set_version(path, version)
        await self.start()
        self.check_answered()

    def damage(self) -> None:
        """Flip a bit of an update in the store, as a disk does."""
        state = self.state
        current = state.current if state else None
        assert self.engine is not None
        if current is None or current.result is not None or not current.updates:
            return
        manifest = current.updates[self.chance.choice(sorted(current.updates))]
        path = self.engine.blobs.path(manifest.digest)
        with contextlib.suppress(FileNotFoundError):
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)

    async def conclude(self) -> None:
        """With all faults over and all nodes at work the job ends well, or says why it does not."""
        assert self.engine is not None
        self.full, self.slow = False, 0.0
        meta = self.spec.metadata.model_copy(update={"generation": self.generation + 1})
        spec = self.spec.spec.model_copy(update={"suspend": False})
        self.spec = self.spec.model_copy(update={"metadata": meta, "spec": spec})
        await self.submit()
        for known in self.engine.jobs.values():
            known.full = None
            known.committed.fire()
        end = time.monotonic() + 20
        while self.state is None or not self.state.finished:
            if time.monotonic() > end:
                here = self.engine.jobs.get(UID)
                shown = status(here.state, here.wait, {}).message if here else "no job"
                raise Stood(f"the job does not end: {shown}")
            for node in NODES:
                await self.work(node)
            self.now += 1
            await asyncio.sleep(0.002)
        if self.state.finished.reason != Reason.ROUNDS_COMPLETED:
            raise Stood(f"ended with {self.state.finished.reason}: {self.state.finished.message}")
        if self.engine.background.dead():
            raise Stood(f"dead: {self.engine.background.dead()}")
        self.check_answered()
        state = self.state
        await self.engine.stop()
        again = replayed(self.directory)
        if again != state:
            raise Stood("the state after a restart differs")


def copy_store(source: Path, target: Path) -> None:
    """Copy a store as a power cut would leave it: the ledger first, then the blobs."""
    target.mkdir()
    for path in sorted(source.glob("ledger.sqlite*"), reverse=True):
        if not path.name.endswith("-shm"):
            shutil.copy(path, target)
    shutil.copytree(source / "blobs", target / "blobs", ignore=shutil.ignore_patterns("temp"))


def set_version(path: Path, version: int) -> int:
    """Set the schema version of a ledger that nobody uses; return the one before."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        before = int(db.execute("PRAGMA user_version").fetchone()[0])
        db.execute(f"PRAGMA user_version = {version}")
    return before


def replayed(directory: Path) -> JobState | None:
    """Return the state that the ledger alone gives."""
    ledger, state = Ledger(directory / "ledger.sqlite"), None
    for entry in ledger.replay():
        state = fold(state, UID, entry)
    ledger.close()
    return state


async def one(directory: Path, chance: random.Random, faults: tuple[str, ...] = FAULTS) -> Counter[str]:
    """Run one schedule; raises Stood."""
    chaos = Chaos(directory, chance)
    await chaos.start()
    await chaos.submit()
    try:
        for _ in range(chance.randint(20, 60)):
            await chaos.fault(chance.choice(faults))
        await chaos.conclude()
    finally:
        if chaos.engine is not None:
            with contextlib.suppress(Exception):
                await chaos.engine.stop()
    return chaos.done


def schedule(seed: int, number: int, kill: bool) -> tuple[int, dict[str, int], str | None]:
    """Run a schedule by its number; with `kill`, first in a process that is killed at a random moment."""
    logging.disable(logging.CRITICAL)
    driver.RETRY_SECONDS = 0.05
    chance = random.Random(f"{seed}/{number}")
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        directory = Path(temporary) / "store"
        try:
            if kill:
                killed(directory, f"{seed}/{number}/killed", chance.uniform(0.05, 0.6))
            done = asyncio.run(one(directory, chance))
        except BaseException as error:
            return number, {}, f"{type(error).__name__}: {error}"
    return number, dict(done) | {"killed": int(kill)}, None


def killed(directory: Path, seed: str, seconds: float) -> None:
    """Work on the store in a forked process and kill it after the given seconds."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            asyncio.run(one(directory, random.Random(seed), KILLED))
        os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def run(schedules: int, seed: int, kills: float, processes: int) -> dict[str, Any]:
    """Return the outcome of the given number of schedules."""
    started, total, failures = time.monotonic(), Counter[str](), {}
    every = max(1, round(1 / kills)) if kills else 0
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        waiting = [
            pool.submit(schedule, seed, number, bool(every) and number % every == 0)
            for number in range(schedules)
        ]
        for found in waiting:
            number, done, error = found.result()
            total.update(done)
            if error is not None:
                failures[number] = error
    return {
        "schedules": schedules,
        "seed": seed,
        "failures": failures,
        "faults": dict(sorted(total.items())),
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> int:
    """Run from the command line; exit 1 when a rule was broken."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schedules", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=float, default=0.1, help="share of schedules with a SIGKILL")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = run(options.schedules, options.seed, options.kills, options.processes) | {"machine": machine()}
    text = json.dumps(found, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
