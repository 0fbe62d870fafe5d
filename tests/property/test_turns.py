# SPDX-License-Identifier: Apache-2.0
"""Turns of namespaces: nobody starves, nobody is lost, whatever comes and is cancelled."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpipe_operator.engine import turns
from fedpipe_operator.engine.turns import Turns


class Clock:
    """Stands still but for `now`."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return the clock that turns go by."""
    found = Clock()
    monkeypatch.setattr(turns, "time", found)
    return found


async def call(found: Turns, clock: Clock, namespace: str, seconds: float, order: list[str]) -> None:
    """Take a turn of so many seconds."""
    async with found.turn(namespace):
        order.append(namespace)
        await asyncio.sleep(0)
        clock.now += seconds


async def test_a_long_call_counts_as_many_short_ones(clock: Clock) -> None:
    found, order = Turns(), list[str]()
    long = [call(found, clock, "long", 90.0, order) for _ in range(3)]
    short = [call(found, clock, "short", 10.0, order) for _ in range(20)]
    await asyncio.gather(*long, *short)
    assert order[:11] == ["long", *["short"] * 9, "long"]


async def test_new_namespaces_do_not_starve_one_that_has_had_much(clock: Clock) -> None:
    found, order = Turns(), list[str]()
    for _ in range(100):
        await call(found, clock, "old", 900.0, order)
    order.clear()
    first = asyncio.create_task(call(found, clock, "new-0", 900.0, order))
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(call(found, clock, "old", 900.0, order))]
    waiting += [asyncio.create_task(call(found, clock, "new-0", 900.0, order)) for _ in range(50)]
    await asyncio.gather(first, *waiting)
    assert order.index("old") <= 2


@given(
    calls=st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=30),
    cancelled=st.lists(st.integers(0, 29), max_size=10),
)
def test_who_is_not_cancelled_has_its_turn_alone(calls: list[tuple[str, bool]], cancelled: list[int]) -> None:
    async def run() -> None:
        found, served, now = Turns(), Counter[int](), 0

        async def one(number: int, namespace: str) -> None:
            nonlocal now
            async with found.turn(namespace):
                now += 1
                assert now == 1
                try:
                    await asyncio.sleep(0)
                    served[number] += 1
                finally:
                    now -= 1

        tasks = [asyncio.create_task(one(number, name)) for number, (name, _) in enumerate(calls)]
        for turn in cancelled:
            await asyncio.sleep(0)
            if turn < len(tasks) and calls[turn][1]:
                tasks[turn].cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        for number, task in enumerate(tasks):
            assert task.cancelled() or served[number] == 1
        await asyncio.wait_for(one(-1, "d"), 10)

    asyncio.run(run())
