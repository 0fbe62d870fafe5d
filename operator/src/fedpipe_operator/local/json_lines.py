# SPDX-License-Identifier: Apache-2.0
"""`fedpipe run --json`: one JSON object a line, for programs; the operator's README describes each."""

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from typing import Any

from fedpipe_api.conditions import Reason

from ..engine.events import JobEvent
from ..engine.jobs import Job
from ..tracking.rows import planned, row
from .directory import History, RunDirectory
from .progress import NodeStates, QuietView, Rounds


def emit(event: str, **fields: Any) -> None:
    """Print an event with its time."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    sys.stdout.write(json.dumps({"time": now, "event": event} | fields, allow_nan=False) + "\n")
    sys.stdout.flush()


class JsonView(QuietView):
    """One JSON object for each event, state of a node, plan and round."""

    def __init__(self) -> None:
        self._plan = 0
        self._nodes = NodeStates()
        self._rounds = Rounds()

    def stage(self, doing: str) -> AbstractContextManager[None]:
        """Print what is done."""
        emit("stage", stage=doing)
        return nullcontext()

    def event(self, event: JobEvent) -> None:
        """Print an event; `show` prints rounds with their evaluation."""
        if event.reason is not Reason.ROUND_DONE:
            emit("notice", reason=str(event.reason), message=event.message, warning=event.warning)

    def show(self, job: Job) -> None:
        """Print the nodes' new states, a new plan, and each round as soon as it is evaluated."""
        state = job.state
        for node, doing in self._nodes.new(job):
            emit("node", node=node, state=doing)
        if state.plan is not None and state.plan.version != self._plan:
            self._plan = state.plan.version
            nodes = {name: planned(made) for name, made in state.plan.nodes.items()}
            emit("plan", plan=self._plan, nodes=nodes, leftOut=state.plan.left_out)
        for number in self._rounds.new(state):
            emit("round", **row(state, number))


def print_end(directory: RunDirectory, history: History) -> None:
    """Print how a finished run ended and where its results are stored."""
    state = history.state
    assert state.finished is not None
    paths = {"adapter": directory.adapter, "report": directory.report, "metrics": directory.metrics}
    emit(
        "end",
        phase=str(state.finished.phase),
        reason=state.finished.reason,
        message=state.finished.message,
        rounds=state.done,
        seconds=(state.finished_at or history.last_at) - state.submitted_at,
        **{name: str(path) if path.exists() else None for name, path in paths.items()},
    )
