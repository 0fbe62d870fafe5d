# SPDX-License-Identifier: Apache-2.0
"""What a node with a valid token cannot do to a job, over real HTTP: take the mean, the metric or the store."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from safetensors.numpy import load, load_file

from fedpipe_api.lora.format import LORA_A, LORA_B
from fedpipe_api.wire import (
    MANIFEST_HEADER,
    Assignment,
)
from fedpipe_operator.coordinator import bodies
from fedpipe_operator.engine import Engine
from fedpipe_operator.engine.allowances import Allowance, Registrations
from fedpipe_operator.engine.events import JobEvent
from fedpipe_operator.engine.status import status
from standins.agents import StandIn, make_update, manifest_of, model_shape, registration
from standins.local import Local, local, working
from standins.server import UID, job

SHAPE = model_shape()
BOGUS = SHAPE.model_copy(update={"architecture": "bogus"})
HUGE = "1" + "0" * 400


def session(node: str) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(headers={"Authorization": f"Bearer token-{node}"})


async def refusal(response: aiohttp.ClientResponse) -> tuple[int, str]:
    found = await response.json()
    assert found["error"].isprintable()
    return response.status, found["reason"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/agents", registration(SHAPE).to_json().replace('"speed":1.0', '"speed":Infinity')),
        ("/v1/agents", registration(SHAPE).to_json().replace('"samples":100', f'"samples":{HUGE}')),
        (
            "/v1/rounds/0/evaluation",
            f'{{"round":0,"samples":1,"tokens":{HUGE},"lossSum":1,"precision":"fp32"}}',
        ),
        ("/v1/progress", f'{{"kind":"train","round":1,"state":"training","step":{HUGE}}}'),
        ("/v1/progress", '{"kind":"train","round":1,"round":1,"state":"training"}'),
        ("/v1/progress", "[" * 60_000),
    ],
    ids=["speed", "samples", "tokens", "step", "twice", "deep"],
)
async def test_what_no_ledger_can_hold_is_refused_and_a_restart_works(
    tmp_path: Path, path: str, body: str
) -> None:
    async with local(tmp_path, nodes=2, count=1) as served:
        async with session("node-0") as agent:
            good = registration(SHAPE).to_json()
            async with agent.post(served.address + "/v1/agents", data=good) as response:
                assert response.status == 200
            async with agent.post(served.address + path, data=body) as response:
                assert await refusal(response) == (422, "Invalid")
        before = served.engine.jobs[UID].state
    again = Engine(tmp_path)
    await again.start()
    try:
        assert again.jobs[UID].state == before
    finally:
        await again.stop()


async def test_samples_of_10_12_take_neither_the_mean_nor_the_metric(tmp_path: Path) -> None:
    notes: list[JobEvent] = []
    async with local(tmp_path, nodes=5, count=1) as served:
        served.engine._journal._notify = lambda uid, note: notes.append(note)
        liar, *honest = (served.agent(node) for node in served.nodes)
        liar.samples = 10**12
        async with working([liar, *honest]):
            await served.finish()
        state = served.engine.jobs[UID].state
        assert state.adapter
        assert state.plan
        found = load_file(served.engine.blobs.path(state.adapter.digest))
        for matrix in state.plan.selected:
            mean = 0.0
            for node in served.nodes:
                plan = state.plan.nodes[node]
                update = load(make_update(SHAPE, plan, node, 1))
                b, a = update[matrix + LORA_B].astype(np.float64), update[matrix + LORA_A].astype(np.float64)
                weight = 3 / 7 if node == liar.node else 1 / 7
                mean = mean + weight * state.spec.adapter.alpha / plan.ranks[matrix] * b @ a
            np.testing.assert_allclose(found[matrix + LORA_B] @ found[matrix + LORA_A], mean, atol=2e-5)
        result = state.rounds[1].result
        assert result
        check = result.checks[liar.node]
        assert check.capped == 300
        text = "1000000000000 samples counted as 300, 3 times the median of the others'"
        assert text in check.reason
        (row,) = (row for row in status(state, None, {}).node_table if row.name == liar.node)
        assert row.message
        assert text in row.message
        assert all(result.checks[agent.node].capped is None for agent in honest)
        assert any("1 counted for less than claimed, first node-0" in note.message for note in notes)


async def test_a_bogus_first_registrant_is_left_out_and_the_honest_train(tmp_path: Path) -> None:
    async with local(
        tmp_path, nodes=3, count=2, rounds={"count": 2, "localSteps": 2, "minUpdates": 2}
    ) as served:
        bogus, *honest = (served.agent(node) for node in served.nodes)
        bogus.shape = BOGUS
        spec = served.engine.jobs[UID].state.spec
        enough = spec.model_copy(update={"nodes": spec.nodes.model_copy(update={"min": 2})})
        await served.engine.change(UID, enough)
        async with working([bogus]):
            async with asyncio.timeout(20):
                while not served.engine.jobs[UID].state.agents:
                    await asyncio.sleep(0.01)
            async with working(honest):
                await served.finish()
        state = served.engine.jobs[UID].state
        assert state.finished
        assert state.finished.phase == "Succeeded"
        assert state.model == SHAPE
        assert state.plan
        assert sorted(state.plan.nodes) == ["node-1", "node-2"]
        why = "its model has another architecture than the job's, which most nodes have; correct spec.model on it"
        assert state.plan.left_out == {"node-0": why}
        (row,) = (row for row in status(state, None, {}).node_table if row.name == "node-0")
        assert (row.state, row.message) == ("left out", why)


async def test_correct_10_9_does_not_end_the_job(tmp_path: Path) -> None:
    rounds = {
        "count": 2, "localSteps": 2, "minUpdates": 2, "until": {"metric": "accuracy", "reaches": 0.99},
    }  # fmt: skip
    async with local(tmp_path, nodes=2, count=2, rounds=rounds) as served:
        liar, honest = (served.agent(node) for node in served.nodes)
        async with working([liar, honest]):
            async with session(liar.node) as agent, asyncio.timeout(20):
                refused = 0
                while not served.engine.jobs[UID].state.finished:
                    number = served.engine.jobs[UID].state.done
                    body = (
                        f'{{"round":{number},"samples":10,"tokens":10,"lossSum":1,"correct":1000000000,'
                        '"precision":"fp32"}'
                    )
                    url = f"{served.address}/v1/rounds/{number}/evaluation"
                    async with agent.post(url, data=body) as response:
                        refused += response.status == 422
                    await asyncio.sleep(0.01)
        state = served.engine.jobs[UID].state
        assert refused
        assert state.finished
        assert state.finished.reason == "RoundsCompleted"


class Opened:
    """A job with an open round, and a way to put updates into it."""

    def __init__(self, served: Local) -> None:
        self.served = served

    @property
    def engine(self) -> Engine:
        return self.served.engine

    async def work(self, node: str) -> Assignment:
        async with session(node) as agent:
            async with agent.get(f"{self.served.address}/v1/assignment?wait=20") as response:
                return Assignment.model_validate_json(await response.read())

    def update(self, node: str, work: Assignment) -> tuple[bytes, str]:
        assert work.plan
        body = make_update(SHAPE, work.plan, node, work.round)
        return body, manifest_of(body, work.plan, work.round, work.adapter).to_json()

    async def put(self, node: str, number: int, body: object, manifest: str) -> tuple[int, str, str | None]:
        """Return status, reason and the Retry-After header."""
        headers = {MANIFEST_HEADER: manifest}
        if not isinstance(body, bytes):
            headers["Content-Length"] = str(len(self.update(node, await self.work(node))[0]))
        url = f"{self.served.address}/v1/rounds/{number}/update"
        async with session(node) as agent, agent.put(url, data=body, headers=headers) as response:
            if response.status == 204:
                return 204, "", None
            code, reason = await refusal(response)
            return code, reason, response.headers.get("Retry-After")


class Profiled(StandIn):
    """A stand-in that ends when it is asked to train."""

    async def _train(self, work: Assignment) -> None:
        await asyncio.Event().wait()


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Opened]:
    async with local(tmp_path, nodes=2, count=3) as served:
        agents: list[StandIn] = [
            Profiled(node, f"token-{node}", lambda: served.address) for node in served.nodes
        ]
        async with working(agents), asyncio.timeout(20):
            while not served.engine.jobs[UID].state.rounds:
                await asyncio.sleep(0.01)
        yield Opened(served)


async def test_old_bytes_are_refused_in_a_later_round_and_their_own_sender_is_answered(
    opened: Opened,
) -> None:
    works = {node: await opened.work(node) for node in opened.served.nodes}
    first = {node: opened.update(node, work) for node, work in works.items()}
    for node, (body, manifest) in first.items():
        assert await opened.put(node, 1, body, manifest) == (204, "", None)
    async with asyncio.timeout(20):
        while len(opened.engine.jobs[UID].state.rounds) < 2:
            await asyncio.sleep(0.01)
    body, manifest = first["node-0"]
    second = await opened.work("node-0")
    assert second.round == 2
    assert second.plan
    assert (await opened.put("node-0", 2, body, manifest))[:2] == (409, "RoundDiffers")
    stale = manifest_of(body, second.plan, 2, None).to_json()
    assert (await opened.put("node-0", 2, body, stale))[:2] == (409, "StartDiffers")
    renamed = manifest_of(body, second.plan, 2, second.adapter).to_json()
    assert (await opened.put("node-0", 2, body, renamed))[:2] == (422, "UpdateReplayed")
    # Its sender did not hear that the first counted, and sends the same again.
    assert await opened.put("node-0", 1, body, manifest) == (204, "", None)
    assert opened.engine.jobs[UID].state.rounds[2].updates == {}
    assert await opened.put("node-0", 2, *opened.update("node-0", second)) == (204, "", None)


async def test_one_node_sends_one_update_at_a_time(opened: Opened) -> None:
    work = await opened.work("node-0")
    body, manifest = opened.update("node-0", work)
    under_way, end = asyncio.Event(), asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield body[:100]
        under_way.set()
        await end.wait()
        yield body[100:]

    first = asyncio.create_task(opened.put("node-0", 1, slowly(), manifest))
    await under_way.wait()
    async with asyncio.timeout(20):
        while not opened.engine.jobs[UID].uploads:
            await asyncio.sleep(0.01)
    for _ in range(20):  # one after the other: more at a time meet the limit of connections first
        assert await opened.put("node-0", 1, body, manifest) == (429, "UploadInProgress", "5")
    assert len(list(opened.engine.blobs.temporary.iterdir())) == 1
    node = await opened.work("node-1")
    assert await opened.put("node-1", 1, *opened.update("node-1", node)) == (204, "", None), "others may"
    end.set()
    assert await first == (204, "", None)
    assert opened.engine.jobs[UID].uploads == {}


async def test_a_job_that_would_take_half_of_the_volume_is_refused(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = await opened.work("node-0")
    body, manifest = opened.update("node-0", work)
    monkeypatch.setattr(type(opened.engine.blobs), "volume", lambda blobs: 2 * len(body) - 1)
    job = opened.engine.jobs[UID]
    assert await opened.put("node-0", 1, body, manifest) == (507, "QuotaExceeded", "30")
    assert list(opened.engine.blobs.temporary.iterdir()) == []
    for _ in range(3):
        job.committed.fire()  # whatever happens meanwhile, the driver looks again
        await asyncio.sleep(0.05)
        assert job.wait
        assert job.wait.reason == "StoreFull", "for as long as it lasts"
        assert job.wait.message.startswith("an update of node-0 is refused: job test may hold")
    monkeypatch.undo()
    assert await opened.put("node-0", 1, body, manifest) == (204, "", None)
    async with asyncio.timeout(20):
        while not job.wait or job.wait.reason != "RoundOpen":
            await asyncio.sleep(0.01)
    assert hashlib.sha256(body).hexdigest() == job.state.rounds[1].updates["node-0"].digest


async def test_all_jobs_of_a_namespace_share_half_of_the_volume(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many jobs a tenant has, the other half is for others."""
    engine, work = opened.engine, await opened.work("node-0")
    body, manifest = opened.update("node-0", work)
    monkeypatch.setattr(type(engine.blobs), "volume", lambda blobs: 2 * len(body))
    wanted = job(2, 1)
    for uid, namespace in (("neighbour", wanted.metadata.namespace), ("stranger", "team-b")):
        meta = wanted.metadata.model_copy(update={"uid": uid, "name": uid, "namespace": namespace})
        await engine.submit(wanted.model_copy(update={"metadata": meta}))
        engine.jobs[uid].uploads["node-0"] = 1
    assert (await opened.put("node-0", 1, body, manifest))[:2] == (507, "QuotaExceeded")
    engine.jobs["neighbour"].uploads.clear()
    assert (await opened.put("node-0", 1, body, manifest))[0] == 204, "what strangers hold is not its own"


@pytest.mark.parametrize("end", ["deleted", "suspended"])
async def test_an_upload_that_nobody_wants_any_more_takes_no_room(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """No quota counts the bytes of a job that is gone, and a slow sender could keep them for days."""
    monkeypatch.setattr(bodies, "SMALLEST_CHUNK", 1)
    monkeypatch.setattr(bodies, "LARGEST_CHUNK", 1)
    engine, work = opened.engine, await opened.work("node-0")
    body, manifest = opened.update("node-0", work)

    async def slowly() -> AsyncIterator[bytes]:
        yield body[:100]
        async with asyncio.timeout(20):
            while not any(path.stat().st_size for path in engine.blobs.temporary.iterdir()):
                await asyncio.sleep(0.01)
        if end == "deleted":
            await engine.delete(UID)
        else:
            spec = engine.jobs[UID].state.spec.model_copy(update={"suspend": True})
            await engine.change(UID, spec)
        yield body[100:200]
        await asyncio.Event().wait()

    under_way = asyncio.create_task(opened.put("node-0", 1, slowly(), manifest))
    async with asyncio.timeout(20):
        await asyncio.wait([under_way])
        while list(engine.blobs.temporary.iterdir()):
            await asyncio.sleep(0.01)
    if under_way.exception() is None:  # else the client saw the connection end before the answer
        assert under_way.result()[0] in (404, 409)


async def test_a_sender_that_has_gone_silent_does_not_keep_its_node_from_sending(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link that broke without a word let the node wait for hours."""
    monkeypatch.setattr(bodies, "PAUSE_SECONDS", 0.2)
    body, manifest = opened.update("node-0", await opened.work("node-0"))

    async def silent() -> AsyncIterator[bytes]:
        yield body[:100]
        await asyncio.Event().wait()

    broken = asyncio.create_task(opened.put("node-0", 1, silent(), manifest))
    async with asyncio.timeout(20):
        await asyncio.wait([broken])
    if broken.exception() is None:
        assert broken.result()[:2] == (408, "TooSlow")
    assert await opened.put("node-0", 1, body, manifest) == (204, "", None)


async def test_coming_and_going_in_a_loop_does_not_fill_the_ledger(tmp_path: Path) -> None:
    async with local(tmp_path, nodes=2, count=1) as served:
        state = served.engine.jobs[UID].state
        async with session("node-0") as agent:
            good = registration(SHAPE).to_json()
            failed = '{"kind":"train","round":1,"state":"failed","message":"again"}'
            answers = set()
            for _ in range(2 * Allowance.BURST):
                async with agent.post(served.address + "/v1/agents", data=good) as response:
                    answers.add(response.status)
                    assert response.status == 200 or "Retry-After" in response.headers
                async with agent.post(served.address + "/v1/progress", data=failed) as response:
                    assert response.status == 200
        assert answers == {200, 429}
        assert state.sequence <= 2 * Allowance.BURST + 10
        async with session("node-1") as agent:
            async with agent.post(served.address + "/v1/agents", data=good) as response:
                assert response.status == 200, "another node's allowance is its own"


async def test_registrations_that_repeat_what_is_known_are_limited_before_they_are_read(
    tmp_path: Path,
) -> None:
    async with local(tmp_path, nodes=1, count=1) as served, session("node-0") as agent:
        good = registration(SHAPE).to_json()
        for _ in range(Registrations.BURST):
            async with agent.post(served.address + "/v1/agents", data=good) as response:
                assert response.status == 200, "one that comes back often is served"
        async with agent.post(served.address + "/v1/agents", data="unreadable") as response:
            assert await refusal(response) == (429, "TooManyRegistrations")
            assert response.headers["Retry-After"] == "10"
