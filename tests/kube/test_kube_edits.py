# SPDX-License-Identifier: Apache-2.0
"""The controller alone: a job that is edited too often goes on; looks that fail are seen from outside."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedpipe_operator.engine import Engine, allowances
from fedpipe_operator.kube import controller
from fedpipe_operator.kube.api import ApiError
from fedpipe_operator.kube.controller import Controller
from fedpipe_operator.kube.settings import OperatorSettings
from kube.objects import NOW, UID, capacity, job, node


class Recorded:
    """An API server of which only what is written matters."""

    def __init__(self) -> None:
        self.pods: list[str] = []
        self.status: Mapping[str, Any] = {}

    async def create_pod(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        self.pods.append(body["spec"]["nodeName"] if "nodeName" in body["spec"] else body["metadata"]["name"])
        return body

    async def apply_status(self, namespace: str, name: str, uid: str, status: Mapping[str, Any]) -> None:
        self.status = status


async def no_ca(namespace: str, owner: dict[str, Any], *, again: bool = False) -> None:
    """The namespace has the CA already."""


def controller_of(engine: Engine, api: Recorded, directory: Path, publish_ca: Any) -> Controller:
    """Return a controller over a real engine."""
    settings = OperatorSettings("fedpipe-system", "fedpipe", directory, "agent:1", "operator:1")
    return Controller(
        engine, api, settings, None, publish_ca=publish_ca, write_output=None, clock=lambda: NOW  # type: ignore[arg-type]
    )  # fmt: skip


def at_generation(generation: int, **spec: Any) -> dict[str, Any]:
    """Return the job as a watch shows it after so many edits."""
    body = job(**spec).to_dict()
    body["metadata"]["generation"] = generation
    return body


async def test_a_job_edited_too_often_goes_on_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(allowances, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(controller, "PACE_SECONDS", 0.0)
    api = Recorded()
    engine = Engine(tmp_path, clock=lambda: NOW)
    await engine.start()
    tended = controller_of(engine, api, tmp_path, no_ca)
    try:
        tended.see_job(at_generation(1))
        known = tended.jobs[UID]
        known.task.cancel()  # type: ignore[union-attr]
        while await tended._look(known) == 0.0:
            pass
        engine.jobs[UID].edits._used[UID] = (allowances.Edits.BURST, now)
        for name in ("edge-1", "edge-2"):
            tended.inventory.see_node(node(name))
            tended.inventory.see_capacity(capacity(name))
        tended.see_job(at_generation(2, rounds={"count": 9, "minUpdates": 2}))
        for _ in range(5):
            await tended._look(known)
        state = engine.jobs[UID].state
        assert state.offered == ("edge-1", "edge-2"), "it goes on"
        assert len(api.pods) == 2
        assert (state.generation, state.spec.rounds.count) == (1, 3)
        now = allowances.Edits.SECONDS
        while await tended._look(known) == 0.0:
            pass
        assert (state.generation, state.spec.rounds.count) == (2, 9)
    finally:
        await tended.stop()
        await engine.stop()


async def test_an_operator_whose_looks_all_fail_is_stuck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The alert FedPipeOperatorStuck follows the time since the last look that worked."""
    monkeypatch.setattr(controller, "PACE_SECONDS", 0.0)
    engine = Engine(tmp_path, clock=lambda: NOW)
    await engine.start()
    tended = controller_of(engine, Recorded(), tmp_path, no_ca)

    async def fail(known: object) -> None:
        raise ApiError(403, "Forbidden", "no right is left")

    look = tended._look
    monkeypatch.setattr(tended, "_look", fail)
    before = tended.last_look
    try:
        tended.see_job(at_generation(1))
        known = tended.jobs[UID]
        async with asyncio.timeout(30):
            while not known.failures:
                await asyncio.sleep(0.01)
            assert tended.last_look == before
            monkeypatch.setattr(tended, "_look", look)
            while tended.last_look == before:
                known.changed.set()
                await asyncio.sleep(0.01)
    finally:
        await tended.stop()
        await engine.stop()


async def test_an_adapter_on_somebodys_laptop_is_refused_before_anything_runs(tmp_path: Path) -> None:
    api = Recorded()
    engine = Engine(tmp_path, clock=lambda: NOW)
    tended = controller_of(engine, api, tmp_path, no_ca)
    await engine.start()
    try:
        tended.see_job(at_generation(1, adapter={"from": {"path": "/etc"}}))
        known = tended.jobs[UID]
        assert known.invalid == "spec.adapter.from.path: is of `fedpipe run`; in a cluster name a job"
        await tended._look(known)
        assert not api.pods
        assert UID not in engine.jobs
    finally:
        await tended.stop()
        await engine.stop()
