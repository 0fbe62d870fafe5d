# SPDX-License-Identifier: Apache-2.0
"""`fedpipe run`: the engine, its coordinator and one agent process for each node, on this machine."""

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from rich.console import Console

from fedpipe_api.base import UserError
from fedpipe_api.conditions import Reason
from fedpipe_api.logs import LINE_FORMAT, LineFormatter

from ..coordinator import Tokens, application
from ..engine import Engine
from ..engine.background import cancel
from ..engine.events import JobEvent
from ..engine.jobs import Job
from ..engine.state import JobState
from ..serving import serve
from ..tracking.trackers import Trackers
from . import manifest
from .agents import Agents, agent_command
from .directory import RunDirectory, RunRecord
from .json_lines import JsonView
from .live import LiveView
from .manifest import LocalJob
from .plan import READING, check
from .progress import PlainView, QuietView, View
from .results import check_output, write_all_results
from .tracking import follow, trackers_of

SUSPENDED = 130
"""Exit status after Ctrl-C, as shells know it."""

_STOP_GRACE = 10.0
"""Seconds that agents get to end by themselves once the job is over; their long poll answers at once."""

_ONLY_AGENTS_END = {
    Reason.WAITING_FOR_AGENTS,
    Reason.NOT_ENOUGH_NODES,
    Reason.PLAN_INFEASIBLE,
    Reason.PROFILING,
    Reason.QUORUM_LOST,
}
"""Reasons to wait that last until an agent does something."""


class End(Enum):
    """How a session ended."""

    FINISHED = "finished"
    SUSPENDED = "suspended"
    MISTAKE = "mistake"  # a person has to fix something
    STUCK = "stuck"  # nothing that runs can bring the job further


@dataclass(frozen=True)
class RunOutcome:
    """How a session ended, and why."""

    end: End
    message: str = ""


class Output(Enum):
    """What a run prints."""

    PEOPLE = "people"  # a picture on a terminal, lines with the time anywhere else
    JSON = "json"
    QUIET = "quiet"


def view(name: str, output: Output) -> View:
    """Return what shows the job of this name."""
    if output is not Output.PEOPLE:
        return JsonView() if output is Output.JSON else QuietView()
    console = Console(highlight=False)
    return LiveView(console, name) if console.is_terminal else PlainView(console)


def run(local: LocalJob, out: Path | None, resume: bool, port: int, output: Output = Output.PEOPLE) -> int:
    """Run a job to its end, or on from where it stopped; return the exit status."""
    as_json = output is Output.JSON
    agent_command()
    directory = RunDirectory(out or Path("runs") / local.job.metadata.name)
    found = _look(directory, local, resume)
    record = RunRecord(uid=found.uid, job=local.job, fleet=local.fleet, model=local.model)
    check_output(local.job.spec)
    trackers = trackers_of(directory, record)
    if found.finished:
        if output is Output.PEOPLE:
            sys.stdout.write(f"{directory.root}: holds this run, finished; nothing is trained again\n")
        return write_all_results(directory, trackers, as_json=as_json)
    seen = view(local.job.metadata.name, output)
    with _listen(port) as listener:
        if found.last_at is None:
            with seen.stage(READING):
                check(local)
        created = directory.create(record)
        before = signal.getsignal(signal.SIGINT)
        session = _session(
            directory, record, local, listener, seen=seen, trackers=trackers, last_at=found.last_at
        )
        outcome = asyncio.run(session)
        signal.signal(signal.SIGINT, before)  # the loop leaves Python's own handler behind
    match outcome.end:
        case End.FINISHED:
            return write_all_results(directory, trackers, as_json=as_json)
        case End.SUSPENDED:
            again = f"fedpipe run {local.job_file} --fleet {local.fleet_file}" + (
                f" --out {out}" if out else ""
            )
            return _stop(f"suspended {_where(directory)}; go on with: {again} --resume", SUSPENDED)
        case End.STUCK:
            return _stop(f"stopped {_where(directory)}: {outcome.message}; fix it and go on with --resume", 1)
        case End.MISTAKE:
            if not resume:
                created.undo()
            raise UserError(outcome.message)


def _stop(message: str, status: int) -> int:
    sys.stderr.write(f"{message}\n")
    return status


@dataclass(frozen=True)
class Found:
    """What a directory holds of this run. `last_at` is when it was last at work."""

    uid: str
    last_at: float | None = None
    finished: bool = False


def _look(directory: RunDirectory, local: LocalJob, resume: bool) -> Found:
    """Return what is there; UserError for anything but a new run, a finished one, or one to resume."""
    root, name = directory.root, local.job.metadata.name
    if not directory.record.exists():
        if resume:
            raise UserError(f"{root}: nothing to resume; run without --resume first")
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise UserError(f"{root}: exists and holds no run; choose another --out")
        above = next(path for path in (root, *root.absolute().parents) if path.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise UserError(f"{root}: {above} cannot be written; choose another --out")
        return Found(str(uuid.uuid4()))
    record = directory.read_record()
    if record.job.metadata.name != name:
        raise UserError(f"{root}: holds a run of job {record.job.metadata.name}; choose another --out")
    changed = manifest.forbidden_change(record.job.spec, local.job.spec)
    if changed:
        raise UserError(
            f"{root}: holds a run of this job with another spec ({changed}); choose another --out"
        )
    history = directory.history()
    if history is not None and history.state.finished:
        if history.state.spec.rounds.count < local.job.spec.rounds.count:
            raise UserError(
                f"{root}: this run is finished, so rounds.count cannot grow; choose another --out"
            )
        return Found(record.uid, finished=True)
    if not resume:
        raise UserError(
            f"{root}: holds this run, stopped {_where(directory)}; "
            "go on with --resume or choose another --out"
        )
    return Found(record.uid, history.last_at if history else None)


def _where(directory: RunDirectory) -> str:
    history = directory.history()
    if history is None or not history.state.rounds:
        return "before round 1"
    state = history.state
    return f"at round {min(state.done + 1, state.spec.rounds.count)}/{state.spec.rounds.count}"


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"--port: {port} is in use; choose another, or leave it out for any free one"
            ) from None
        raise UserError(f"--port: {port}: {error.strerror}") from None
    return listener


def _clock(last_at: float | None) -> Callable[[], float]:
    """Return the run's clock: it stands still while the run does, so that no deadline passes meanwhile."""
    behind = 0.0 if last_at is None else max(0.0, time.time() - last_at)
    return lambda: time.time() - behind


async def _session(
    directory: RunDirectory,
    record: RunRecord,
    local: LocalJob,
    listener: socket.socket,
    *,
    seen: View,
    trackers: Trackers,
    last_at: float | None,
) -> RunOutcome:
    """Run the engine and the agents until the job ends, is interrupted, or cannot go on."""
    # Written only if there is something to show.
    to_file = logging.FileHandler(directory.log, delay=True)
    to_file.setFormatter(LineFormatter(LINE_FORMAT))
    logging.basicConfig(handlers=[to_file], force=True)
    interrupted = asyncio.Event()
    for sign in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(sign, interrupted.set)

    def notify(uid: str, event: JobEvent) -> None:
        # A mistake that an agent finds before the first round ends the run, and is reported there, once.
        if event.reason not in (Reason.AGENT_LOST, Reason.AGENT_FAILED) or engine.jobs[uid].state.rounds:
            seen.event(event)

    engine = Engine(directory.store, clock=_clock(last_at), notify=notify, reads_paths=True)
    await engine.start()
    tokens = Tokens()
    coordinator = await serve(application(engine, tokens), listener, shutdown_timeout=1.0)
    if record.uid in engine.jobs:
        await engine.change(record.uid, local.job.spec)
    else:
        meta = local.job.metadata.model_copy(update={"uid": record.uid})
        await engine.submit(local.job.model_copy(update={"metadata": meta}))
    await engine.set_eligible_nodes(
        record.uid, [member.node.name for member in local.members], local.excluded
    )
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    agents = Agents(
        engine,
        uid=record.uid,
        members=local.members,
        model=local.model,
        directory=directory.agents,
        tokens=tokens,
        url=url,
    )
    outcome = RunOutcome(End.SUSPENDED)
    follower = asyncio.create_task(follow(trackers, engine, record.uid)) if trackers else None
    try:
        with seen:
            outcome = await _watch(engine.jobs[record.uid], engine, agents, seen, interrupted)
    finally:
        await agents.end(_STOP_GRACE if outcome.end is End.FINISHED else 0.0)
        await coordinator.close()
        await cancel([follower])
        await engine.stop()
    return outcome


async def _watch(
    job: Job, engine: Engine, agents: Agents, seen: View, interrupted: asyncio.Event
) -> RunOutcome:
    """Show the job as it moves until there is nothing more to wait for."""
    stop = asyncio.create_task(interrupted.wait())
    try:
        while True:
            seen.show(job)
            outcome = (
                RunOutcome(End.SUSPENDED)
                if interrupted.is_set()
                else outcome_of(job, agents.failed, agents.mistakes)
            )
            if outcome is not None:
                return outcome
            moved = asyncio.create_task(engine.moved(job.state.uid, 1.0))
            await asyncio.wait({moved, stop}, return_when=asyncio.FIRST_COMPLETED)
            moved.cancel()
    finally:
        stop.cancel()


def outcome_of(job: Job, failed: Mapping[str, str], mistakes: Mapping[str, str]) -> RunOutcome | None:
    """Return how the session ends, or None while it goes on.

    `failed` are the agents that will not be started again, and why; `mistakes` those a person has to help.
    """
    state = job.state
    if state.finished:
        return RunOutcome(End.FINISHED)
    if not state.rounds and mistakes:
        # Nothing is trained yet: better to have the mistake fixed than to train on part of the fleet.
        node, message = min(mistakes.items())
        return RunOutcome(End.MISTAKE, f"{node}: {message}")
    wait = job.wait
    if wait is None or wait.until is not None or wait.reason not in _ONLY_AGENTS_END:
        return None
    if _expected(state, failed):
        return None
    message = wait.message + "".join(f"; {node}: {why}" for node, why in sorted(failed.items()))
    return RunOutcome(End.STUCK if state.rounds else End.MISTAKE, message)


def _expected(state: JobState, failed: Mapping[str, str]) -> bool:
    """Return whether some agent may still register, or deliver what it works on."""
    if any(node not in state.live and node not in failed for node in state.desired):
        return True
    if state.plan is not None and not state.profiling_done:
        return bool(set(state.planned) - set(state.profiles))
    current = state.current
    if current is None or current.closed:
        return False
    return bool(set(current.opened.participants) - set(current.updates) - set(state.lost))
