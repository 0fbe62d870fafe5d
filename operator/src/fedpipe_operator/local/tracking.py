# SPDX-License-Identifier: Apache-2.0
"""`spec.tracking` of a run on this machine: its trackers, and sending them each round while it runs."""

import asyncio

from ..engine import Engine
from ..engine.background import uninterrupted
from ..tracking.rows import rounds, times
from ..tracking.trackers import MLflowRun, Subject, TensorBoard, Tracker, Trackers, parameters
from .directory import RunDirectory, RunRecord


def trackers_of(directory: RunDirectory, record: RunRecord) -> Trackers:
    """Return the run's trackers; UserError names a missing library. Nothing is written or sent yet."""
    wanted, job = record.job.spec.tracking, record.job
    found: list[Tracker] = []
    if wanted is not None and wanted.tensor_board:
        found.append(TensorBoard(directory.root / "tensorboard", record.uid))
    if wanted is not None and wanted.mlflow is not None:
        about = dict(parameters(job.spec, record.model, len(record.fleet.nodes)))
        subject = Subject(uid=record.uid, name=job.metadata.name, parameters=about)
        found.append(MLflowRun(wanted.mlflow, subject))
    return Trackers(found)


async def follow(trackers: Trackers, engine: Engine, uid: str) -> None:
    """Send each round once the next is done, which evaluates it; until cancelled."""
    sent = 0
    while True:
        state = engine.jobs[uid].state
        if state.done > sent:
            rows, sent = rounds(state)[:-1], state.done
            await uninterrupted(asyncio.to_thread(trackers.send, rows, times(state)))
        await engine.moved(uid, 60.0)
