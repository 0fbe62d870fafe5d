# SPDX-License-Identifier: Apache-2.0
"""What a person sees while a job runs where there is no terminal: lines with the time, or nothing."""

import time
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console

from fedpipe_api import units
from fedpipe_api.conditions import Reason

from ..engine.events import JobEvent
from ..engine.jobs import Job
from ..engine.state import JobState
from ..engine.status import status
from .wording import facts, known_round, loss_text, metric_text

_FEW = 8
"""Nodes whose states have a line each before the first round; of more they would be a flood."""


class View(Protocol):
    """Where a run shows itself."""

    def __enter__(self) -> Self:
        """Begin."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""
        ...

    def stage(self, doing: str) -> AbstractContextManager[None]:
        """Show what is done before the job begins."""
        ...

    def event(self, event: JobEvent) -> None:
        """Show an event."""
        ...

    def show(self, job: Job) -> None:
        """Show where the job stands."""
        ...


class QuietView:
    """Nothing; the base of views that have nothing to begin or end."""

    def __enter__(self) -> Self:
        """Nothing to begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to end."""

    def stage(self, doing: str) -> AbstractContextManager[None]:
        """Show nothing."""
        return nullcontext()

    def event(self, event: JobEvent) -> None:
        """Show nothing."""

    def show(self, job: Job) -> None:
        """Show nothing."""


class NodeStates:
    """The nodes' states before the first round, each once."""

    def __init__(self) -> None:
        self._seen: dict[str, str] = {}

    def new(self, job: Job) -> list[tuple[str, str]]:
        """Return the nodes whose state has changed, and the state."""
        if job.state.rounds:
            return []
        heard = {node: live.progress for node, live in job.live.items() if live.progress}
        found = {node.name: node.state for node in status(job.state, None, heard).node_table}
        changed = [(name, state) for name, state in found.items() if self._seen.get(name) != state]
        self._seen = found
        return changed


class Rounds:
    """Numbers of rounds, each once all of its evaluation is known."""

    def __init__(self) -> None:
        self._last: int | None = None

    def new(self, state: JobState) -> range:
        """Return the rounds that have become known; a resumed run showed its earlier ones when they were."""
        if self._last is None:
            self._last = known_round(state) if state.rounds else -1
        first, self._last = self._last + 1, max(self._last, known_round(state))
        return range(first, self._last + 1)


class PlainView(QuietView):
    """One line with the time for each event, state of a node and round."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._plan: list[str] = []
        self._nodes = NodeStates()
        self._rounds = Rounds()

    def stage(self, doing: str) -> AbstractContextManager[None]:
        """Print what is done."""
        self._print(doing)
        return nullcontext()

    def event(self, event: JobEvent) -> None:
        """Print an event; `show` prints rounds with their evaluation."""
        if event.reason is not Reason.ROUND_DONE:
            self._print(f"{event.reason}: {event.message}")

    def show(self, job: Job) -> None:
        """Print the nodes' new states and plans, and each round as soon as it is evaluated."""
        state = job.state
        changed = self._nodes.new(job)
        for node, doing in changed if len(state.offered) <= _FEW else []:
            self._print(f"  {node}  {doing}")
        plan = _plan_lines(state)
        if plan != self._plan:
            self._plan = plan
            for line in plan:
                self._print(line)
        for number in self._rounds.new(state):
            self._print(_round_line(state, number))

    def _print(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')}  {text}"
        self._console.print(line, soft_wrap=True, markup=False)
        self._console.file.flush()


def _spaced(*parts: str) -> str:
    return "  ".join(part for part in parts if part)


def _plan_lines(state: JobState) -> list[str]:
    """Return what the plan gives each node, one line each."""
    lines = []
    for node in status(state, None, {}).node_table:
        precision, ranks, batch = facts(node)
        if precision:
            lines.append(
                _spaced(f"  {node.name}", precision, ranks, f"batch {batch}", f"limited by {node.limited_by}")
            )
    return lines


def _round_line(state: JobState, number: int) -> str:
    if number == 0:
        return _spaced("untrained ", metric_text(state, 0), loss_text(state, 0))
    known = state.rounds[number]
    size = units.transfer(sum(manifest.size for manifest in known.updates.values()))
    took = f"{(known.result_at or 0) - known.opened_at:.1f} s"
    head = f"round {number}/{state.spec.rounds.count}"
    what = metric_text(state, number), loss_text(state, number)
    return _spaced(head, *what, f"{len(known.updates)} updates", f"{size} up", took)
