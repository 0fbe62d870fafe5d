# SPDX-License-Identifier: Apache-2.0
"""Whatever the engine accepts, it can start again from, and nothing of any job's state differs then."""

import asyncio
import importlib
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fedpipe_api.conditions import Reason
from fedpipe_api.wire import AssignmentKind, Progress
from fedpipe_operator.engine.journal import Journal
from standins.server import job as new_job

BENCH = Path(__file__).resolve().parents[1] / "bench"
KINDS = ["work", "work", "work", "failed", "silent", "running", "suspend", "edit", "delete"]
STEPS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 2)), min_size=1, max_size=14)
# Register, profile, train two rounds, and all that may come in between.
WHOLE = [("work", node) for _ in range(3) for node in range(3)]
LONG = [*WHOLE, ("failed", 0), ("work", 0), ("suspend", 0), ("suspend", 0), *WHOLE, ("edit", 1), *WHOLE]


async def send(chaos: Any, kind: str, node: str) -> None:
    """Send one message, or one change of the spec; a refusal is an answer too."""
    engine = chaos.engine
    if kind in ("suspend", "edit"):
        return await chaos.change(kind)
    if kind == "delete":
        return await engine.delete("job-1")
    if kind == "work" or "job-1" not in engine.jobs:
        return await chaos.work(node)
    with chaos.tolerant():
        if kind == "silent":
            return await engine.mark_lost("job-1", node, "no sign of life")
        state = "failed" if kind == "failed" else "training"
        message = Progress(kind=AssignmentKind.TRAIN, round=1, step=1, state=state)
        await engine.progress("job-1", node, message)
    return None


async def restarted(chaos: Any) -> None:
    """Stop, and compare what a start reads with what was in memory."""
    await chaos.check_reason()
    while (job := chaos.engine.jobs.get("job-1")) and job.wait and job.wait.reason == Reason.AGGREGATING:
        await asyncio.sleep(0.001)
        await chaos.check_reason()
    await chaos.engine.stop()
    before = {uid: known.state for uid, known in chaos.engine.jobs.items()}
    journal = Journal(chaos.store.resolve(), clock=lambda: chaos.now)
    await journal.replay()
    after = {uid: known.state for uid, known in journal.jobs.items()}
    journal.close()
    assert not journal.quarantined
    assert after == before
    chaos.now += 1
    await chaos.start()


@pytest.mark.slow
@settings(
    max_examples=8, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(STEPS)
@example(LONG)
def test_a_restart_after_every_message_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, steps: list[tuple[str, int]]
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    bench, schedule = importlib.import_module("chaos"), importlib.import_module("chaos_schedule")
    witnessed = importlib.import_module("chaos_witness")

    async def run(store: Path, said: Path) -> int:
        witness = witnessed.Witness(said)
        witness.say("spec", new_job(2, 3).to_dict())
        chaos = schedule.Chaos(store, random.Random(0), witness)
        await chaos.start()
        try:
            for kind, node in steps:
                await send(chaos, kind, f"node-{node}")
                await restarted(chaos)
            return chaos.state.done if chaos.state else 0
        finally:
            await chaos.engine.stop()
            witness.close()

    with bench.quick(), bench.stored() as (store, said):
        done = asyncio.run(run(store, said))
    assert done >= 2 or steps is not LONG
