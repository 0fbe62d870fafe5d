# SPDX-License-Identifier: Apache-2.0
import asyncio
import hashlib
import threading
import time

import pytest
from aiohttp import web

from agent_fixtures import Coordinator, refusal, registered
from fedpipe_agent import heartbeat, transport
from fedpipe_agent.errors import Aborted, Failure, RequestRefused
from fedpipe_agent.heartbeat import Work
from fedpipe_agent.transport import Transport
from fedpipe_api import wire
from fedpipe_api.wire import AssignmentKind


@pytest.fixture
def coordinator():
    with Coordinator(registered()) as running:
        yield running


@pytest.fixture
def link(coordinator, tmp_path):
    return connected(coordinator, tmp_path)


def connected(coordinator, tmp_path, **options):
    token = tmp_path / "token"
    token.write_text("secret\n")
    blobs = tmp_path / "blobs"
    blobs.mkdir(exist_ok=True)
    return Transport(coordinator.url, token, blobs, **{"give_up": 20, **options})


def update_file(tmp_path, size):
    path = tmp_path / "update"
    path.write_bytes(bytes(range(256)) * (size // 256))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = wire.UpdateManifest(
        digest=digest,
        size=path.stat().st_size,
        samples=1,
        steps=1,
        planned_steps=1,
        micro_batch=1,
        train_loss=1.0,
        step_seconds=0.1,
        peak_bytes=1,
        tokens=1,
    )
    return path, manifest


def test_the_token_is_read_for_each_request(coordinator, link, tmp_path):
    assert link.job() == registered()
    (tmp_path / "token").write_text("rotated")
    link.job()
    assert [r.headers["Authorization"] for r in coordinator.requests] == ["Bearer secret", "Bearer rotated"]


def test_connections_are_reused(coordinator, link):
    for _ in range(5):
        link.job()
    assert len({id(request.protocol) for request in coordinator.requests}) == 1


@pytest.mark.parametrize("status", [500, 503, 408, 429])
def test_passing_failures_are_retried(coordinator, link, status):
    coordinator.faults["job"] = [lambda _: web.Response(status=status)] * 2
    assert link.job() == registered()
    assert len(coordinator.requests) == 3


def test_retry_after_is_honoured(coordinator, link):
    coordinator.faults["job"] = [lambda _: web.Response(status=429, headers={"Retry-After": "1"})]
    begin = time.monotonic()
    link.job()
    assert time.monotonic() - begin >= 1


def test_a_refusal_is_not_retried(coordinator, link):
    coordinator.faults["job"] = [lambda _: refusal(403, "WrongToken", "token of another job")]
    with pytest.raises(RequestRefused, match=r"403 WrongToken\): token of another job") as caught:
        link.job()
    assert (caught.value.status, caught.value.reason) == (403, "WrongToken")
    assert len(coordinator.requests) == 1


def test_it_gives_up_on_an_unreachable_coordinator(tmp_path, unused_tcp_port):
    (tmp_path / "token").write_text("secret")
    link = Transport(f"http://127.0.0.1:{unused_tcp_port}", tmp_path / "token", tmp_path, give_up=0.6)
    begin = time.monotonic()
    with pytest.raises(Failure, match=r"coordinator unreachable for 0.6 s"):
        link.job()
    assert 0.5 < time.monotonic() - begin < 3


def test_it_waits_for_a_coordinator_that_comes_back(coordinator, link):
    async def drop(request):
        request.transport.abort()
        await asyncio.sleep(0)
        return web.Response()

    coordinator.faults["job"] = [drop] * 3
    assert link.job() == registered()


def test_an_unknown_answer_is_a_failure(coordinator, link):
    coordinator.faults["job"] = [lambda _: web.json_response({"surprise": 1})]
    with pytest.raises(Failure, match="not understood"):
        link.job()


def test_an_endless_answer_is_cut(coordinator, link):
    body = b" " * (transport.RESPONSE_LIMIT + 1)
    coordinator.faults["job"] = [lambda _: web.Response(body=body)]
    with pytest.raises(Failure, match="above"):
        link.job()


def test_no_work_is_none(coordinator, link):
    assert link.assignment(wait=0.1) is None
    coordinator.assignments.append(wire.Assignment(kind=AssignmentKind.STOP, reason="done"))
    assert link.assignment(wait=0.1).reason == "done"


def test_a_cut_download_goes_on_where_it_was_cut(coordinator, link, tmp_path):
    data = bytes(range(256)) * 4000
    blob = coordinator.add(data)

    async def cut(request):
        start = request.http_range.start or 0
        response = web.StreamResponse(
            status=206, headers={"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        )
        response.content_length = len(data) - start
        await response.prepare(request)
        await response.write(data[start : start + 300_000])
        await asyncio.sleep(0.05)
        request.transport.abort()
        return response

    coordinator.faults["blobs"] = [cut, cut]
    path = link.blob(blob)
    assert path.read_bytes() == data
    starts = [request.http_range.start or 0 for request in coordinator.requests]
    assert starts[0] == 0
    assert starts == sorted(set(starts))
    assert len(starts) == 3


def test_a_blob_is_fetched_once_and_the_one_before_is_dropped(coordinator, link, tmp_path):
    first, second = coordinator.add(b"first"), coordinator.add(b"second")
    link.blob(first)
    link.blob(first)
    assert len(coordinator.requests) == 1
    assert link.blob(second).read_bytes() == b"second"
    assert [path.name for path in (tmp_path / "blobs").iterdir()] == [second.digest]


def test_a_damaged_blob_is_fetched_again(coordinator, link):
    blob = coordinator.add(b"0123456789")
    coordinator.faults["blobs"] = [
        lambda _: web.Response(body=b"0123456780", status=206, headers={"Content-Range": "bytes 0-9/10"}),
        lambda _: web.Response(body=b"0123456789abc", status=206, headers={"Content-Range": "bytes 0-12/13"}),
    ]
    assert link.blob(blob).read_bytes() == b"0123456789"
    assert len(coordinator.requests) == 3


def test_a_coordinator_without_ranges_sends_it_whole(coordinator, link, tmp_path):
    blob = coordinator.add(b"0123456789")
    (tmp_path / "blobs" / f"{blob.digest}.part").write_bytes(b"0123")
    coordinator.faults["blobs"] = [lambda _: web.Response(body=b"0123456789")] * 2
    assert link.blob(blob).read_bytes() == b"0123456789"


def test_an_update_arrives_whole_after_a_retry(coordinator, link, tmp_path):
    path, manifest = update_file(tmp_path, 1 << 20)

    async def fail(request):
        await request.content.read(100_000)
        request.transport.abort()
        return web.Response()

    coordinator.faults["rounds"] = [fail, lambda _: web.Response(status=503)]
    assert link.update(3, path, manifest)
    assert coordinator.updates == [(manifest, path.read_bytes())]
    assert coordinator.requests[-1].headers["Content-Length"] == str(manifest.size)
    assert coordinator.requests[-1].path == "/v1/rounds/3/update"


def test_an_update_of_a_closed_round_is_dropped(coordinator, link, tmp_path):
    path, manifest = update_file(tmp_path, 4096)
    coordinator.faults["rounds"] = [lambda _: refusal(409, "RoundClosed", "round 3 is closed")]
    assert not link.update(3, path, manifest)
    coordinator.faults["rounds"] = [lambda _: refusal(422, "BadTensor", "lora_A")]
    with pytest.raises(RequestRefused, match="BadTensor"):
        link.update(4, path, manifest)


def test_reports_that_come_too_late_are_dropped(coordinator, link):
    coordinator.faults["profile"] = [lambda _: refusal(409, "NotProfiling")]
    coordinator.faults["rounds"] = [lambda _: refusal(409, "RoundClosed"), lambda _: refusal(422)]
    link.profile(wire.ProfileReport(step_seconds=1, peak_bytes=1, micro_batch=1))
    sums = wire.Evaluation(round=1, samples=1, tokens=1, loss_sum=1, precision="fp32")
    link.evaluation(sums)
    with pytest.raises(RequestRefused):
        link.evaluation(sums)


def test_a_blob_that_is_gone_ends_the_work(coordinator, link):
    blob = coordinator.add(b"gone")
    coordinator.faults["blobs"] = [lambda _: refusal(404, "BlobUnknown")]
    with pytest.raises(Aborted):
        link.blob(blob)


def test_the_declared_link_paces_both_ways(coordinator, tmp_path):
    link = connected(coordinator, tmp_path, link_rate=1_000_000)
    path, manifest = update_file(tmp_path, 512 * 1024)
    blob = coordinator.add(path.read_bytes())
    for transfer in (lambda: link.update(1, path, manifest), lambda: link.blob(blob)):
        begin = time.monotonic()
        transfer()
        assert 0.5 <= time.monotonic() - begin < 2


def test_work_shows_signs_of_life_and_learns_that_it_is_over(coordinator, link, monkeypatch):
    monkeypatch.setattr(heartbeat, "PERIOD", 0.05)
    with Work(link, AssignmentKind.TRAIN, 2) as work:
        work.report(state="training", step=1, steps=9)
        work.check()
        wait_until(lambda: len(coordinator.progress) > 3)
        coordinator.wanted = False
        with pytest.raises(Aborted):
            wait_until(lambda: work.check() and False)
    last = coordinator.progress[-1]
    assert (last.kind, last.round, last.state, last.step, last.steps) == (
        AssignmentKind.TRAIN,
        2,
        "training",
        1,
        9,
    )
    wait_until(lambda: not any(thread.name == "heartbeat" for thread in threading.enumerate()))


def test_a_change_of_state_is_reported_at_once(coordinator, link):
    with Work(link, AssignmentKind.TRAIN, 2) as work:
        for state in ("evaluating", "training", "uploading"):
            work.report(state=state)
            wait_until(
                lambda state=state: coordinator.progress and coordinator.progress[-1].state == state, 1
            )


def test_an_unreachable_coordinator_does_not_end_the_work(coordinator, link, monkeypatch):
    monkeypatch.setattr(heartbeat, "PERIOD", 0.02)
    coordinator.faults["progress"] = [lambda _: web.Response(status=503), lambda _: refusal(404)]
    with Work(link, AssignmentKind.TRAIN, 2) as work:
        wait_until(lambda: coordinator.progress)
        work.check()


def wait_until(condition, seconds=5):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
