# SPDX-License-Identifier: Apache-2.0
"""When an agent stops being one, and how decisions about readers are kept: at a clock that tests turn."""

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from fedpipe_api.names import child_name
from fedpipe_operator.coordinator import Identity, application
from fedpipe_operator.engine import Engine, Refused
from fedpipe_operator.kube.access import CACHE_SIZE, KEEP_SECONDS, METRICS, Access
from fedpipe_operator.kube.api import ApiError
from fedpipe_operator.kube.identity import JobName, PodIdentities
from fedpipe_operator.kube.inventory import Inventory
from fedpipe_operator.kube.token_review import AT_ONCE
from fedpipe_operator.serving import listen, serve
from kube.objects import NOW, UID, owner, pod, stamp
from kube.test_kube_parts import Clock, Reviews
from standins.server import UID as LOCAL_UID
from standins.server import job


def changed(body: Any, **parts: Any) -> Any:
    """Return a Pod with other parts."""
    return body | {part: body[part] | fields for part, fields in parts.items()}


@pytest.mark.parametrize(
    ("parts", "agent"),
    [
        ({}, True),
        ({"metadata": {"ownerReferences": []}}, False),
        ({"metadata": {"ownerReferences": [owner(uid="other-uid")]}}, False),
        ({"metadata": {"ownerReferences": [owner(name="other")]}}, False),
        ({"metadata": {"ownerReferences": [owner() | {"apiVersion": "example.com/v1"}]}}, False),
        ({"metadata": {"ownerReferences": [owner() | {"controller": False}]}}, False),
        ({"spec": {"nodeName": "edge-2"}}, False),
        ({"status": {"phase": "Succeeded"}}, False),
        ({"status": {"phase": "Failed"}}, False),
        ({"metadata": {"deletionTimestamp": stamp(NOW + 30)}}, True),
        ({"metadata": {"deletionTimestamp": stamp(NOW)}}, False),
    ],
)
@pytest.mark.parametrize("watched", [True, False])
async def test_everything_that_a_pod_says_must_agree(
    parts: dict[str, Any], agent: bool, watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedpipe_operator.kube.identity.expiry", lambda token: NOW + 3600)
    api, inventory = Reviews(), Inventory(lambda: None, lambda uid: None)
    names = {UID: JobName("support", "tickets")}
    identify = PodIdentities(api, inventory.pod, names.get, Clock())  # type: ignore[arg-type]
    body = pod("edge-1")
    if watched:
        inventory.see_pod(body)
        assert await identify("good") == Identity(UID, "edge-1")
    body = changed(body, **parts)
    api.pods[child_name("tickets", "edge-1")] = body
    if watched:
        inventory.see_pod(body)
    assert await identify("good") == (Identity(UID, "edge-1") if agent else None)


class Ending:
    """Knows everybody, until somebody's Pod ends."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def __call__(self, token: str) -> Identity | None:
        return None if self.ended.is_set() else Identity(LOCAL_UID, token.removeprefix("token-"))


async def test_a_long_poll_ends_with_the_pod(tmp_path: Path) -> None:
    engine, identify = Engine(tmp_path), Ending()
    await engine.start()
    site = await serve(application(engine, identify), listen("127.0.0.1", 0))
    await engine.submit(job(2, 1))
    await engine.set_eligible_nodes(LOCAL_UID, ["node-0", "node-1"])
    url = f"http://127.0.0.1:{site.port}/v1/assignment?wait=1"
    try:
        async with aiohttp.ClientSession(headers={"Authorization": "Bearer token-node-0"}) as session:
            async with session.get(url) as answer:
                assert answer.status != 401
            poll = asyncio.create_task(session.get(url))
            await asyncio.sleep(0.2)
            identify.ended.set()
            async with await poll as answer:
                assert answer.status == 401
    finally:
        await site.close()
        await engine.stop()


class Deciding:
    """An API server that knows one reader and counts what it is asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.away = False
        self.allowed = True

    async def review_token(self, token: str, audience: str | None) -> Any:
        self.asked += 1
        if self.away:
            raise ApiError(0, "Unreachable", "the API server does not answer")
        return {"authenticated": token == "good", "user": {"username": "reader"}}

    async def review_access(self, user: Any, right: Any) -> bool:
        if self.away:
            raise ApiError(0, "Unreachable", "the API server does not answer")
        return self.allowed


async def status_of(access: Access, token: str) -> int:
    try:
        await access.check(token, None, METRICS)
    except Refused as refused:
        return refused.status
    return 200


async def test_a_decision_is_kept_for_a_while_and_none_is_made_unasked() -> None:
    api, clock = Deciding(), Clock()
    access = Access(api, clock)  # type: ignore[arg-type]
    assert await status_of(access, "") == 401
    assert await status_of(access, "\udcff") == 401
    assert api.asked == 0
    for _ in range(5):
        assert await status_of(access, "good") == 200
        assert await status_of(access, "bad") == 401
    assert api.asked == 2
    api.allowed = False
    clock.now += KEEP_SECONDS
    assert await status_of(access, "good") == 403
    api.away = True
    clock.now += KEEP_SECONDS
    assert await status_of(access, "good") == 503
    api.away, api.allowed = False, True
    assert await status_of(access, "good") == 200, "that nobody answered is not kept"


async def test_strangers_do_not_fill_the_memory_nor_push_out_those_who_are_let_in() -> None:
    api = Deciding()
    access = Access(api, Clock())  # type: ignore[arg-type]
    assert await status_of(access, "good") == 200
    for number in range(CACHE_SIZE + 50):
        assert await status_of(access, f"token-{number}") == 401
    assert {allowed: len(kept) for allowed, kept in access._decisions._kept.items()} == {
        True: 1,
        False: CACHE_SIZE,
    }
    asked = api.asked
    assert await status_of(access, "good") == 200
    assert api.asked == asked


class Slow(Deciding):
    """An API server that answers nobody until it is let, and knows how many wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = asyncio.Event()

    async def review_token(self, token: str, audience: str | None) -> Any:
        self.asked += 1
        await self.answers.wait()
        return {"authenticated": False}


async def test_strangers_ask_the_api_server_a_few_questions_at_a_time() -> None:
    api = Slow()
    identities = PodIdentities(api, lambda *names: None, lambda uid: None)  # type: ignore[arg-type]
    callers = [asyncio.create_task(identities(f"token-{number}")) for number in range(200)]
    callers += [asyncio.create_task(identities("token-0")) for _ in range(20)]
    for _ in range(10):
        await asyncio.sleep(0)
    assert api.asked == AT_ONCE
    api.answers.set()
    assert set(await asyncio.gather(*callers)) == {None}
    assert api.asked == 200, "each token once"
