# SPDX-License-Identifier: Apache-2.0
"""What a start holds in memory of a long ledger, and a long job of its plans."""

import gc
import weakref
from pathlib import Path

import pytest

from fedpipe_operator.engine import Engine, journal
from fedpipe_operator.engine.records import AgentLost, PlanMade
from fedpipe_operator.engine.state import JobState, apply
from fedpipe_operator.store import Entry, Ledger
from kube.looks import state_of
from kube.objects import job

RECORDS = 500


async def test_a_start_holds_a_few_records_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tmp_path)
    await engine.start()
    await engine.submit(job())
    await engine.stop()
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for i in range(RECORDS):
        record = AgentLost(sequence=i + 1, node="edge-1", reason="x" * 100)
        # The last belongs to no job: whatever is set aside is read again, as little of it at a time.
        uid = "unknown" if i == RECORDS - 1 else "job-uid"
        ledger.append(Entry(uid, record.key, 1_800_000_000.0 + i, record.to_json()))
    ledger.close()
    held: weakref.WeakSet[Entry] = weakref.WeakSet()
    most, read = 0, 0

    class Counted(Entry):
        def __init__(self, *args: object, **more: object) -> None:
            nonlocal most, read
            super().__init__(*args, **more)  # type: ignore[arg-type]
            held.add(self)
            read += 1
            most = max(most, len(held))

        __hash__ = object.__hash__

    monkeypatch.setattr("fedpipe_operator.store.ledger.Entry", Counted)
    engine = Engine(tmp_path)
    await engine.start()
    try:
        assert set(engine.jobs) | set(engine.quarantined) == {"job-uid", "unknown"}
    finally:
        await engine.stop()
    assert read >= 2 * RECORDS, "what is set aside is read once more"
    assert most <= 2 * journal._AT_ONCE + 1


def planned(state: JobState, version: int) -> PlanMade:
    """Return the job's plan again as another version of it, as it is read from the ledger."""
    assert state.plan is not None
    changes = {"version": version, "scores": {"m": 1.0 + version}}
    return PlanMade.model_validate_json(state.plan.model_copy(update=changes).to_json())


def test_plans_share_their_ranks_and_keep_what_is_read_again() -> None:
    state = state_of(job(), ("a", "b"), ("a", "b"), plan=("a", "b"))
    first = state.plan
    assert first is not None
    for version in range(2, 6):
        apply(state, planned(state, version), 1_800_000_000.0 + version)
    gc.collect()
    ranks = {id(plan.nodes["a"].ranks) for plan in state.plans.values()}
    assert len(ranks) == 1
    assert [bool(plan.scores) for plan in state.plans.values()][1:] == [False, False, True, True]
    assert {plan.nodes["b"] == first.nodes["b"] for plan in state.plans.values()} == {True}
