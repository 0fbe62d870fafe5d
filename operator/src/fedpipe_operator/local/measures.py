# SPDX-License-Identifier: Apache-2.0
"""What people read of a run's rows: the JSON lines, and the one line that sums it up."""

import json

from fedpipe_api import units
from fedpipe_api.job import Phase

from ..engine.privacy import job_epsilon
from ..engine.state import JobState
from ..tracking.rows import RoundRow
from .directory import History
from .wording import called, figure, shown_metric


def to_jsonl(rows: list[RoundRow]) -> str:
    """Return the rows as JSON lines."""
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def outcome(history: History, rows: list[RoundRow]) -> str:
    """Return the one line that sums the run up."""
    state = history.state
    spent = units.duration((state.finished_at or history.last_at) - state.submitted_at)
    name = shown_metric(state)
    series = [row[name] for row in rows if row[name] is not None]
    up, down = (sum(row.get(key, 0) for row in rows) for key in ("bytesUp", "bytesDown"))
    head = "done in" if state.finished and state.finished.phase is Phase.SUCCEEDED else "stopped after"
    parts = [f"{head} {spent}"]
    if series:
        start = "as given" if state.given else "untrained"
        before = f" ({start} {figure(name, series[0])})" if rows[0]["round"] == 0 else ""
        parts.append(f"{called(name)} {figure(name, series[-1])}{before}")
    parts.append(f"{units.transfer(up)} up, {units.transfer(down)} down")
    return " · ".join(filter(None, (*parts, budget(state))))


def budget(state: JobState) -> str:
    """Return the privacy that was spent, of what the job may spend; empty for a job without privacy."""
    privacy = state.spec.privacy
    return "" if privacy is None else f"ε {job_epsilon(state):.3g} of {privacy.epsilon:g} spent"


def memory(size: int | None) -> str:
    """Return bytes of memory as text, empty where they are not known."""
    return "" if size is None else units.memory(size)
