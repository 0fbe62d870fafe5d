# SPDX-License-Identifier: Apache-2.0
"""What a person sees on a terminal while a job runs: a picture of the job and its nodes, redrawn in place."""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedpipe_api import units, wire
from fedpipe_api.conditions import Reason
from fedpipe_api.status import NodeStatus

from ..engine.events import JobEvent
from ..engine.jobs import Job
from ..engine.state import JobState
from ..engine.status import eta_seconds, phase_of, status
from .wording import facts, known_round, metric_text

_INTERVAL = 0.2
"""Seconds between two pictures; more often only flickers."""

_WIDE = 90
"""Columns from which the tokens per second have room too."""


@contextmanager
def stage(console: Console, doing: str) -> Iterator[None]:
    """Show on a terminal what is done, with a clock, until the block ends."""
    if not console.is_terminal:
        yield
        return
    columns = TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as clock:
        clock.add_task(doing)
        yield


class LiveView:
    """A picture that is redrawn in place; events scroll by above it."""

    def __init__(self, console: Console, name: str) -> None:
        self._console = console
        self._name = name
        self._live = Live(console=console, auto_refresh=False, transient=False)
        self._drawn = 0.0
        self._begun = time.monotonic()
        self._since: dict[str, tuple[str, float]] = {}

    def __enter__(self) -> Self:
        """Take the terminal's last lines."""
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last picture standing."""
        self._live.refresh()
        self._live.stop()

    def stage(self, doing: str) -> AbstractContextManager[None]:
        """Show what is done before the job begins."""
        return stage(self._console, doing)

    def event(self, event: JobEvent) -> None:
        """Print an event above the picture; finished rounds are in the picture already."""
        if event.reason is not Reason.ROUND_DONE:
            style = "yellow" if event.warning else "dim"
            # A path in it can be copied only where no line is broken.
            self._console.print(Text(f"{event.reason}: {event.message}", style=style), soft_wrap=True)

    def show(self, job: Job) -> None:
        """Draw the job, unless it was drawn a moment ago."""
        now = time.monotonic()
        if now - self._drawn >= _INTERVAL or job.state.finished:
            self._drawn = now
            found = picture(self._name, job, self._console.width, now - self._begun, self._seconds(job, now))
            self._live.update(found, refresh=True)

    def _seconds(self, job: Job, now: float) -> dict[str, float]:
        """Return how long each node has been in its state."""
        for node, live in job.live.items():
            doing = live.progress.state if live.progress else ""
            if self._since.get(node, ("", 0.0))[0] != doing or node not in self._since:
                self._since[node] = (doing, now)
        return {node: now - since for node, (_, since) in self._since.items()}


def picture(name: str, job: Job, width: int, elapsed: float, seconds: Mapping[str, float]) -> Group:
    """Return the job's line and one row for each node, at most `width` columns wide.

    `elapsed` are the job's seconds so far, `seconds` those of each node in its state.
    """
    heard = {node: live.progress for node, live in job.live.items() if live.progress}
    found = status(job.state, job.wait, heard)
    notes = [
        Text(f"   {node.name}: {node.message}", "yellow", no_wrap=True, overflow="ellipsis")
        for node in found.node_table
        if node.message
    ]
    nodes = _node_rows(found.node_table, heard, seconds, width)
    return Group(_job_line(name, job, heard, elapsed), nodes, *notes)


def _job_line(name: str, job: Job, heard: dict[str, wire.Progress], elapsed: float) -> Table:
    state = job.state
    line = Table.grid(padding=(0, 2), expand=True)
    line.add_column(no_wrap=True)
    line.add_column(no_wrap=True)
    clock = f"{int(elapsed) // 60}:{int(elapsed) % 60:02}"
    if not state.rounds and not state.finished:
        line.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        line.add_column(no_wrap=True)
        waiting = job.wait.message if job.wait else ""
        line.add_row(Text(name, style="bold"), str(phase_of(state)).lower(), waiting, clock)
        return line
    line.add_column(ratio=1)
    line.add_column(no_wrap=True)
    line.add_column(no_wrap=True)
    count = state.spec.rounds.count
    left = eta_seconds(state)
    line.add_row(
        Text(name, style="bold"),
        f"round {min(state.done + 1, count)}/{count}",
        ProgressBar(total=count, completed=count if state.finished else state.done + _part(state, heard)),
        metric_text(state, max(0, known_round(state))),
        f"{clock}, ETA {units.duration(left)}" if left else clock,
    )
    return line


def _part(state: JobState, heard: dict[str, wire.Progress]) -> float:
    """Return the share of the current round's steps that is done."""
    current = state.current
    if current is None or current.closed or state.plan is None:
        return 0.0
    done = total = 0
    for node in current.opened.participants:
        if node not in state.plan.nodes:
            continue
        steps, progress = state.plan.nodes[node].local_steps, heard.get(node)
        total += steps
        if node in current.updates:
            done += steps
        elif progress is not None and progress.round == current.opened.round:
            done += min(progress.step, steps)
    return done / max(1, total)


_COLUMNS = ("node", "base", "ranks", "batch", "state", "step", "train loss", "tokens/s")
_RIGHT = ("step", "train loss", "tokens/s")


def _node_rows(
    nodes: tuple[NodeStatus, ...],
    heard: dict[str, wire.Progress],
    seconds: Mapping[str, float],
    width: int,
) -> Table:
    columns = _COLUMNS if width >= _WIDE else _COLUMNS[:-1]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column(width=1)
    for name in columns:
        table.add_column(
            name, no_wrap=True, overflow="ellipsis", justify="right" if name in _RIGHT else "left"
        )
    for node in nodes:
        progress = heard.get(node.name)
        working = progress is not None and node.state == progress.state and progress.steps > 0
        loss = progress.loss if working and progress and progress.loss is not None else node.train_loss
        steps = f"{progress.step}/{progress.steps}" if working and progress else ""
        speed = progress.tokens_per_second if working and progress else None
        since = seconds.get(node.name, 0.0)
        busy = progress is not None and node.state == progress.state and not working and since >= 1
        doing = f"{node.state} {units.duration(int(since))}" if busy else node.state
        cells: list[Text | str] = [
            node.name, *facts(node), Text(doing, _style(node.state)), steps,
            "" if loss is None else f"{loss:.2f}", f"{speed:.0f}" if speed else "",
        ]  # fmt: skip
        table.add_row("", *cells[: len(columns)])
    return table


def _style(state: str) -> str:
    return {"uploaded": "green", "lost": "red", "left out": "yellow", "training": "cyan"}.get(state, "")
