# SPDX-License-Identifier: Apache-2.0
"""Thousands of jobs: a look at one costs the same, however many others there are."""

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from fedpipe_operator.engine import Engine
from fedpipe_operator.kube.api import ApiError
from fedpipe_operator.kube.controller import Controller
from kube.objects import NOW, UID, capacity, job, node
from kube.test_kube_edits import Recorded, controller_of


class Published:
    """What was made known to a namespace: the name of its owner each time; `fault` is raised instead."""

    def __init__(self) -> None:
        self.owners: list[str] = []
        self.fault: ApiError | None = None

    async def __call__(self, namespace: str, owner: dict[str, Any], *, again: bool = False) -> None:
        if self.fault:
            raise self.fault
        assert (owner["kind"], owner["controller"], namespace) == ("FedPipeJob", False, "support")
        self.owners.append(owner["name"])


@asynccontextmanager
async def tended(directory: Path, published: Published) -> AsyncIterator[tuple[Controller, Recorded]]:
    """A controller over a real engine that looks at a job only when asked to."""
    api = Recorded()
    engine = Engine(directory, clock=lambda: NOW)
    await engine.start()
    found = controller_of(engine, api, directory, published)
    found._drive = lambda known: asyncio.sleep(3600)  # type: ignore[assignment,method-assign]
    try:
        yield found, api
    finally:
        await found.stop()
        await engine.stop()


async def lines_of_looks(others: int) -> int:
    """Return the lines of Python that run from a job's first look to the one that changes nothing more."""
    lines, task = 0, asyncio.current_task()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if event == "line" and asyncio.current_task() is task:
            lines += 1
        return trace

    with tempfile.TemporaryDirectory() as directory:
        async with tended(Path(directory), Published()) as (found, api):
            for name in ("edge-1", "edge-2"):
                found.inventory.see_node(node(name))
                found.inventory.see_capacity(capacity(name))
            for i in range(others):
                other = job(f"other-{i}", f"uid-{i}", nodes={"selector": {"matchLabels": {"site": "no"}}})
                found.see_job(other.to_dict())
                await found.engine.submit(other)
            found.see_job(job().to_dict())
            known = found.jobs[UID]
            sys.settrace(trace)
            try:
                for _ in range(6):
                    await found._look(known)
            finally:
                sys.settrace(None)
            assert len(api.pods) == 2
    return lines


async def test_a_look_costs_the_same_however_many_jobs_there_are() -> None:
    few, many = await lines_of_looks(2), await lines_of_looks(200)
    assert many < few + 50, "less than a line for each of 198 jobs"


async def test_jobs_that_have_ended_are_not_woken_by_the_fleet(tmp_path: Path) -> None:
    async with tended(tmp_path, Published()) as (found, _):
        for uid in ("running", "ended"):
            found.see_job(job(uid, uid).to_dict())
            await found.engine.submit(job(uid, uid))
            found.jobs[uid].changed.clear()
        found.engine.jobs["ended"].state.finished = object()  # type: ignore[assignment]
        found.wake_all()
        assert {uid for uid, known in found.jobs.items() if known.changed.is_set()} == {"running"}


async def test_what_a_namespace_shares_goes_from_a_deleted_job_to_the_next(tmp_path: Path) -> None:
    published = Published()
    async with tended(tmp_path, published) as (found, _):
        for uid in ("first", "second", "third"):
            found.see_job(job(uid, uid).to_dict())
        await found.forget_job("first")
        assert published.owners == ["second"]
        published.fault = ApiError(0, "Unreachable", "the API server does not answer")
        with pytest.raises(ApiError):
            await found.forget_job("second")
        published.fault = ApiError(403, "Forbidden", "the namespace is being terminated")
        await found.forget_job("second")
        published.fault = None
        await found.forget_job("third")
        assert published.owners == ["second"], "nobody is left to own it"
