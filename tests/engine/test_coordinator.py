# SPDX-License-Identifier: Apache-2.0
"""The round protocol over real HTTP: whole jobs, and every message that must be refused."""

import asyncio
import hashlib
import io
import json
import os
import pickle
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from safetensors.numpy import load, load_file, save

from fedpipe_api.lora.format import LORA_A, LORA_B
from fedpipe_api.wire import (
    MANIFEST_HEADER,
    Assignment,
    UpdateManifest,
)
from fedpipe_operator.engine.status import status
from standins.agents import make_update, manifest_of, model_shape, registration
from standins.local import Local, local, working
from standins.server import UID


@pytest.mark.parametrize("method", ["exact", "zero-pad", "average", "truncate", "stack"])
async def test_a_job_runs_through_with_every_method(tmp_path: Path, method: str) -> None:
    async with local(tmp_path, nodes=3, count=3, method=method) as served:
        async with working([served.agent(node) for node in served.nodes]):
            await served.finish()
        state = served.engine.jobs[UID].state
        assert state.finished
        assert (state.finished.phase, state.finished.reason) == ("Succeeded", "RoundsCompleted")
        assert state.done == 3
        assert state.adapter
        tensors = load_file(served.engine.blobs.path(state.adapter.digest))
        assert all(np.isfinite(tensor).all() for tensor in tensors.values())
        assert any(np.abs(t).max() > 0 for name, t in tensors.items() if name.endswith(LORA_B))
        shown = status(state, None, {})
        assert (shown.rounds, shown.phase, len(shown.history)) == ("3/3", "Succeeded", 3)
        assert shown.metric
        assert shown.metric.value == pytest.approx(0.3), "3 of 10 are right after round 3, says the stand-in"
        assert shown.history[-1].loss == pytest.approx(20 / 4 / 10)
        assert all(row.bytes_up > 0 for row in shown.history)
        assert shown.history[-1].bytes_down > 0


async def test_the_first_round_is_the_weighted_mean_of_the_updates(tmp_path: Path) -> None:
    async with local(tmp_path, nodes=2, count=1) as served:
        async with working([served.agent(node) for node in served.nodes]):
            await served.finish()
        state = served.engine.jobs[UID].state
        assert state.adapter
        assert state.plan
        found = load_file(served.engine.blobs.path(state.adapter.digest))
        for matrix in state.plan.selected:
            total = 0.0
            for node in served.nodes:
                plan = state.plan.nodes[node]
                update = load(make_update(model_shape(), plan, node, 1))
                scale = state.spec.adapter.alpha / plan.ranks[matrix]
                b, a = update[matrix + LORA_B].astype(np.float64), update[matrix + LORA_A].astype(np.float64)
                total = total + 0.5 * scale * b @ a
            np.testing.assert_allclose(found[matrix + LORA_B] @ found[matrix + LORA_A], total, atol=2e-5)


@pytest.fixture
async def open_round(tmp_path: Path) -> AsyncIterator[Local]:
    """Round 1 is open for two nodes."""
    async with local(tmp_path, nodes=2, count=2) as served:
        async with aiohttp.ClientSession() as session:
            for node in served.nodes:
                await post(session, served, node, "/v1/agents", registration(model_shape()).to_json())
            for node in served.nodes:
                await profile(session, served, node)
            for node in served.nodes:
                work = await assignment(session, served, node)
                assert work.round == 1
        yield served


def bearer(node: str) -> dict[str, str]:
    return {"Authorization": f"Bearer token-{node}"}


async def post(session: aiohttp.ClientSession, served: Local, node: str, path: str, body: str) -> None:
    async with session.post(served.address + path, data=body, headers=bearer(node)) as response:
        assert response.status < 300, await response.text()


async def assignment(session: aiohttp.ClientSession, served: Local, node: str) -> Assignment:
    async with session.get(f"{served.address}/v1/assignment?wait=10", headers=bearer(node)) as response:
        assert response.status == 200
        return Assignment.model_validate_json(await response.read())


async def profile(session: aiohttp.ClientSession, served: Local, node: str) -> None:
    work = await assignment(session, served, node)
    assert (work.kind, work.importance, work.profile_steps) == ("profile", True, 3)
    scores = {m.name: 1.0 for m in model_shape().matrices}
    body = json.dumps({"stepSeconds": 0.1, "peakBytes": 1, "microBatch": 1, "scores": scores})
    await post(session, served, node, "/v1/profile", body)


async def put(
    served: Local,
    body: bytes,
    *,
    node: str = "node-0",
    round_number: int | str = 1,
    manifest: UpdateManifest | str | None = None,
    token: str | None = None,
    sent: bytes | None = None,
) -> tuple[int, str]:
    """Put an update; returns the status and the refusal's reason."""
    plan = served.engine.jobs[UID].state.plan
    assert plan
    manifest = manifest or manifest_of(body, plan.nodes["node-0"])
    text = manifest if isinstance(manifest, str) else manifest.to_json()
    headers = {MANIFEST_HEADER: text} | ({"Authorization": f"Bearer {token}"} if token else bearer(node))
    url = f"{served.address}/v1/rounds/{round_number}/update"
    async with (
        aiohttp.ClientSession() as session,
        session.put(url, data=io.BytesIO(body if sent is None else sent), headers=headers) as response,
    ):
        if response.status == 204:
            return 204, ""
        refusal = json.loads(await response.text())
        assert set(refusal) == {"reason", "error"}
        assert "\n" not in refusal["error"]
        return response.status, refusal["reason"]


def good(served: Local, node: str = "node-0") -> bytes:
    plan = served.engine.jobs[UID].state.plan
    assert plan
    return make_update(model_shape(), plan.nodes[node], node, 1)


def changed(body: bytes, name: str, value: np.ndarray | None) -> bytes:
    tensors = load(body)
    first = next(key for key in sorted(tensors) if key.endswith(LORA_B))
    if value is None:
        del tensors[first]
    else:
        tensors[first if name == "first" else name] = value
    return save(tensors)


def poisoned(body: bytes, poison: float) -> bytes:
    tensors = load(body)
    first = next(key for key in sorted(tensors) if key.endswith(LORA_B))
    tensors[first] = tensors[first].copy()
    tensors[first].flat[3] = poison
    return save(tensors)


def body_lying_about_offsets(body: bytes) -> bytes:
    header = json.dumps({"x": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}).encode()
    return len(header).to_bytes(8, "little") + header + b"\0" * 16


BAD_BODIES = {
    "a pickle": (lambda b: pickle.dumps({"x": os.urandom(50)}), 422),
    "garbage": (lambda b: os.urandom(500), 422),
    "empty tensor list": (lambda b: save({}), 422),
    "a missing tensor": (lambda b: changed(b, "first", None), 422),
    "an unknown tensor": (lambda b: changed(b, "../../etc/passwd", np.zeros((1,), np.float32)), 422),
    "a wrong shape": (lambda b: changed(b, "first", np.zeros((7, 7), np.float32)), 422),
    "a wrong dtype": (lambda b: changed(b, "first", np.zeros((16, 2), np.float64)), 422),
    "NaN": (lambda b: poisoned(b, float("nan")), 422),
    "Inf": (lambda b: poisoned(b, float("-inf")), 422),
    "offsets past the end": (body_lying_about_offsets, 422),
    "a header of 2^60 bytes": (lambda b: (1 << 60).to_bytes(8, "little") + b"{}", 422),
    "a body above the limit": (lambda b: b + b"\0" * (2 << 20), 413),
}


@pytest.mark.parametrize("case", BAD_BODIES)
async def test_a_bad_body_is_refused_and_the_round_unharmed(open_round: Local, case: str) -> None:
    make, expected = BAD_BODIES[case]
    code, reason = await put(open_round, make(good(open_round)))
    assert code == expected
    assert reason
    assert open_round.engine.jobs[UID].state.rounds[1].updates == {}
    assert list(open_round.engine.blobs.temporary.iterdir()) == []
    assert await put(open_round, good(open_round)) == (204, "")


async def test_bad_frames_are_refused(open_round: Local) -> None:
    body = good(open_round)
    plan = open_round.engine.jobs[UID].state.plan
    assert plan
    truth = manifest_of(body, plan.nodes["node-0"])
    wrong = truth.model_copy(update={"digest": "0" * 64})
    huge = truth.model_copy(update={"size": 10**12})
    cases = [
        (await put(open_round, body, manifest=wrong), (422, "DigestDiffers")),
        (await put(open_round, body, manifest=huge), (413, "TooLarge")),
        (await put(open_round, body, manifest="{"), (422, "Invalid")),
        (await put(open_round, body, manifest='{"digest": "../../x"}'), (422, "Invalid")),
        (await put(open_round, body, sent=body[:-10]), (400, "SizeDiffers")),
        (await put(open_round, body, round_number=7), (409, "RoundUnknown")),
        (await put(open_round, body, round_number="..%2f1"), (404, "RoundUnknown")),
        (await put(open_round, body, node="node-9"), (403, "NotAParticipant")),
        (await put(open_round, body, token="stolen"), (401, "Unauthenticated")),
    ]
    for got, wanted in cases:
        assert got == wanted
    assert open_round.engine.jobs[UID].state.rounds[1].updates == {}


async def test_a_body_that_breaks_off_leaves_nothing(open_round: Local) -> None:
    body = good(open_round)
    plan = open_round.engine.jobs[UID].state.plan
    assert plan
    host, port = open_round.address.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = (
        f"PUT /v1/rounds/1/update HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer token-node-0\r\n"
        f"{MANIFEST_HEADER}: {manifest_of(body, plan.nodes['node-0']).to_json()}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body[: len(body) // 2])
    await writer.drain()
    writer.close()
    async with asyncio.timeout(5):
        while list(open_round.engine.blobs.temporary.iterdir()):
            await asyncio.sleep(0.01)
    assert open_round.engine.jobs[UID].state.rounds[1].updates == {}
    assert await put(open_round, body) == (204, "")


async def test_the_same_update_twice_counts_once_and_another_is_refused(open_round: Local) -> None:
    body = good(open_round)
    assert await put(open_round, body) == (204, "")
    assert await put(open_round, body) == (204, "")
    other = poisoned(body, 0.5)
    assert await put(open_round, other) == (409, "AlreadyAccepted")
    digest = hashlib.sha256(body).hexdigest()
    assert open_round.engine.jobs[UID].state.rounds[1].updates["node-0"].digest == digest
    assert await put(open_round, good(open_round, "node-1"), node="node-1") == (204, "")
    async with asyncio.timeout(10):
        while open_round.engine.jobs[UID].state.done < 1:
            await open_round.engine.moved(UID, 1)
    assert await put(open_round, body) == (204, ""), "an agent that missed the answer may ask again"
    assert await put(open_round, other) == (409, "RoundClosed")


async def test_an_agent_reads_only_what_its_job_uses(open_round: Local) -> None:
    secret = open_round.engine.blobs.incoming()
    secret.write(b"of another job")
    digest = secret.finish()
    open_round.engine.blobs.adopt(secret.path, digest)
    async with aiohttp.ClientSession(headers=bearer("node-0")) as session:
        for name in (digest, "0" * 64, "..%2f..%2fledger.sqlite", "ledger.sqlite"):
            async with session.get(f"{open_round.address}/v1/blobs/{name}") as response:
                assert response.status == 404, name


async def test_a_cut_download_resumes(open_round: Local) -> None:
    for node in open_round.nodes:
        assert await put(open_round, good(open_round, node), node=node) == (204, "")
    async with aiohttp.ClientSession(headers=bearer("node-0")) as session:
        async with session.get(f"{open_round.address}/v1/assignment?wait=10") as response:
            work = Assignment.model_validate_json(await response.read())
        assert work.adapter
        url = f"{open_round.address}/v1/blobs/{work.adapter.digest}"
        async with session.get(url, headers={"Range": "bytes=100-"}) as response:
            assert response.status == 206
            rest = await response.read()
        async with session.get(url, headers={"Range": "bytes=0-99"}) as response:
            start = await response.read()
    assert hashlib.sha256(start + rest).hexdigest() == work.adapter.digest


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/v1/agents", "{", 422),
        ("/v1/agents", '{"version": 1}', 422),
        ("/v1/progress", "x" * 70_000, 413),
        ("/v1/progress", '{"kind": "train", "round": -1, "state": "x"}', 422),
        ("/v1/rounds/1/evaluation", '{"round": 0, "samples": 1, "tokens": 1, "lossSum": 1, "precision": "fp32"}', 400),
        ("/v1/rounds/5/evaluation", '{"round": 5, "samples": 1, "tokens": 1, "lossSum": 1, "precision": "fp32"}', 409),
        ("/v1/rounds/0/evaluation", '{"round": 0, "samples": 1, "tokens": 1, "lossSum": NaN, "precision": "fp32"}', 422),
        ("/v1/profile", '{"stepSeconds": 1, "peakBytes": 1, "microBatch": 1}', 204),
        ("/v1/nothing", "", 404),
    ],
)  # fmt: skip
async def test_control_messages_are_checked(open_round: Local, path: str, body: str, expected: int) -> None:
    async with aiohttp.ClientSession(headers=bearer("node-0")) as session:
        async with session.post(open_round.address + path, data=body) as response:
            assert response.status == expected
            if expected >= 400:
                assert json.loads(await response.text())["error"]


async def test_progress_says_whether_the_work_is_still_wanted(open_round: Local) -> None:
    async with aiohttp.ClientSession(headers=bearer("node-0")) as session:

        async def wanted() -> bool:
            body = json.dumps({"kind": "train", "round": 1, "state": "training", "step": 1, "steps": 2})
            async with session.post(f"{open_round.address}/v1/progress", data=body) as response:
                return bool((await response.json())["wanted"])

        assert await wanted()
        assert await put(open_round, good(open_round)) == (204, "")
        assert not await wanted()


async def test_a_failed_agent_is_lost_until_it_calls_again(open_round: Local) -> None:
    state = open_round.engine.jobs[UID].state
    async with aiohttp.ClientSession(headers=bearer("node-0")) as session:
        body = json.dumps(
            {"kind": "train", "round": 1, "state": "failed", "message": "train.jsonl:3: no text"}
        )
        async with session.post(f"{open_round.address}/v1/progress", data=body) as response:
            assert not (await response.json())["wanted"]
        assert state.lost == {"node-0": "train.jsonl:3: no text"}
        async with session.get(f"{open_round.address}/v1/assignment") as response:
            assert response.status == 200
        assert state.lost == {}


async def test_anyone_may_measure_the_link_and_do_nothing_else(open_round: Local) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{open_round.address}/v1/link") as response:
            assert len(await response.read()) >= 64 * 1024
        for path in ("/v1/job", "/v1/assignment", "/v1/link/../job", f"/v1/blobs/{'0' * 64}"):
            async with session.get(open_round.address + path) as response:
                assert response.status == 401, path
