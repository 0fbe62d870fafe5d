# SPDX-License-Identifier: Apache-2.0
"""What a person sees while a job runs: a live table on a terminal, timestamped lines anywhere else."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedpipe_api import units, wire
from fedpipe_api.conditions import Reason
from fedpipe_api.job import FedPipeJob
from fedpipe_api.status import NodeStatus

from ..engine.decide import awaited_evaluations, metric_value
from ..engine.events import JobEvent
from ..engine.jobs import Job
from ..engine.state import JobState, evaluation_of
from ..engine.status import eta_seconds, metric_name, phase_of, status

_INTERVAL = 0.2
"""Seconds between two pictures; more often only flickers."""

_WIDE = 90
"""Columns from which the tokens per second have room too."""


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

    def event(self, event: JobEvent) -> None:
        """Show an event."""
        ...

    def show(self, job: Job) -> None:
        """Show where the job stands."""
        ...


def view(job: FedPipeJob) -> View:
    """Return the view that fits standard output."""
    console = Console(highlight=False)
    return LiveView(console, job.metadata.name) if sys.stdout.isatty() else PlainView(console)


@contextmanager
def stage(console: Console, doing: str) -> Iterator[None]:
    """Show on a terminal what is done, with a clock, until the block ends."""
    if not console.is_terminal:
        yield
        return
    with Progress(
        TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True
    ) as clock:
        clock.add_task(doing)
        yield


def plain_line(text: str) -> str:
    """Return a line of output that is no terminal's, with the time."""
    return f"{time.strftime('%H:%M:%S')}  {text}"


def facts(node: NodeStatus) -> tuple[str, str, str]:
    """Return precision, ranks and batch of a node as people read them; empty without a plan."""
    if node.precision is None:
        return "", "", ""
    ranks = "–" if node.min_rank is None else f"r {node.min_rank}"
    if node.max_rank != node.min_rank:
        ranks += f"–{node.max_rank}"
    batch = f"{node.micro_batch}" + (f"×{node.accumulation}" if node.accumulation != 1 else "")
    return str(node.precision), ranks, batch


def metric_text(state: JobState, number: int) -> str:
    """Return the metric of a round with its change, such as `accuracy 0.742 (+0.051)`; empty if unknown."""
    name = metric_name(state)
    value = metric_value(state, number, name)
    if value is None:
        return ""
    before = metric_value(state, number - 1, name)
    return f"{name} {value:.3f}" + (f" ({value - before:+.3f})" if before is not None else "")


def _known_round(state: JobState) -> int:
    """Return the latest round that no further evaluation is awaited of; -1 for none."""
    if state.finished or not awaited_evaluations(state, state.done):
        return state.done if evaluation_of(state, state.done) else state.done - 1
    return state.done - 1


def _spaced(*parts: str) -> str:
    return "  ".join(part for part in parts if part)


class PlainView:
    """One timestamped line for each event and each round."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._printed: int | None = None
        self._plan: list[str] = []

    def __enter__(self) -> Self:
        """Nothing to begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to end."""

    def event(self, event: JobEvent) -> None:
        """Print an event; `show` prints rounds with their evaluation."""
        if event.reason is not Reason.ROUND_DONE:
            self._print(f"{event.reason}: {event.message}")

    def show(self, job: Job) -> None:
        """Print what a plan gives the nodes when that changes, and each round as soon as it is evaluated."""
        state = job.state
        if self._printed is None:
            # A resumed run printed its earlier rounds when they were done.
            self._printed = _known_round(state) if state.rounds else -1
        plan = _plan_lines(state)
        if plan != self._plan:
            self._plan = plan
            for line in plan:
                self._print(line)
        while self._printed < _known_round(state):
            self._printed += 1
            self._print(_round_line(state, self._printed))

    def _print(self, text: str) -> None:
        self._console.print(plain_line(text), soft_wrap=True, markup=False)
        self._console.file.flush()


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
    found = evaluation_of(state, number)
    loss = "" if found is None or metric_name(state) == "loss" else f"loss {found.loss:.3f}"
    if number == 0:
        return _spaced("untrained ", metric_text(state, 0), loss)
    known = state.rounds[number]
    size = units.transfer(sum(manifest.size for manifest in known.updates.values()))
    took = f"{(known.result_at or 0) - known.opened_at:.1f} s"
    head = f"round {number}/{state.spec.rounds.count}"
    return _spaced(
        head, metric_text(state, number), loss, f"{len(known.updates)} updates", f"{size} up", took
    )


class LiveView:
    """A picture of the job and its nodes that is redrawn in place; events scroll by above it."""

    def __init__(self, console: Console, name: str) -> None:
        self._console = console
        self._name = name
        self._live = Live(console=console, auto_refresh=False, transient=False)
        self._drawn = 0.0

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

    def event(self, event: JobEvent) -> None:
        """Print an event above the picture; finished rounds are in the picture already."""
        if event.reason is not Reason.ROUND_DONE:
            style = "yellow" if event.warning else "dim"
            self._console.print(Text(f"{event.reason}: {event.message}", style=style))

    def show(self, job: Job) -> None:
        """Draw the job, unless it was drawn a moment ago."""
        now = time.monotonic()
        if now - self._drawn >= _INTERVAL or job.state.finished:
            self._drawn = now
            self._live.update(picture(self._name, job, self._console.width), refresh=True)


def picture(name: str, job: Job, width: int) -> Group:
    """Return the job's line and one row for each node, at most `width` columns wide."""
    heard = {node: live.progress for node, live in job.live.items() if live.progress}
    found = status(job.state, job.wait, heard)
    notes = [Text(f"   {node.name}: {node.message}", "yellow") for node in found.node_table if node.message]
    return Group(_job_line(name, job, heard), _node_rows(found.node_table, heard, width), *notes)


def _job_line(name: str, job: Job, heard: dict[str, wire.Progress]) -> Table:
    state = job.state
    line = Table.grid(padding=(0, 2), expand=True)
    line.add_column(no_wrap=True)
    line.add_column(no_wrap=True)
    if not state.rounds and not state.finished:
        line.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        line.add_row(
            Text(name, style="bold"), str(phase_of(state)).lower(), job.wait.message if job.wait else ""
        )
        return line
    line.add_column(ratio=1)
    line.add_column(no_wrap=True)
    line.add_column(no_wrap=True)
    count = state.spec.rounds.count
    seconds = eta_seconds(state)
    eta = "" if seconds is None else f"ETA {units.duration(seconds)}"
    line.add_row(
        Text(name, style="bold"),
        f"round {min(state.done + 1, count)}/{count}",
        ProgressBar(total=count, completed=count if state.finished else state.done + _part(state, heard)),
        metric_text(state, max(0, _known_round(state))),
        eta,
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


def _node_rows(nodes: tuple[NodeStatus, ...], heard: dict[str, wire.Progress], width: int) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=1)
    for column in range(8 if width >= _WIDE else 7):
        table.add_column(no_wrap=True, overflow="ellipsis", justify="right" if column in (5, 7) else "left")
    for node in nodes:
        progress = heard.get(node.name)
        working = progress is not None and node.state == progress.state and progress.steps > 0
        loss = progress.loss if working and progress and progress.loss is not None else node.train_loss
        steps = f"{progress.step}/{progress.steps}" if working and progress else ""
        speed = progress.tokens_per_second if working and progress else None
        precision, ranks, batch = facts(node)
        cells: list[Text | str] = [
            node.name, precision, ranks, f"batch {batch}" if batch else "",
            Text(node.state, _style(node.state)), steps,
            "" if loss is None else f"loss {loss:.2f}", f"{speed:.0f} tok/s" if speed else "",
        ]  # fmt: skip
        table.add_row("", *cells[: 8 if width >= _WIDE else 7])
    return table


def _style(state: str) -> str:
    return {"uploaded": "green", "lost": "red", "left out": "yellow", "training": "cyan"}.get(state, "")
