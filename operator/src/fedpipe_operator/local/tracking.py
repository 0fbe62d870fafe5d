# SPDX-License-Identifier: Apache-2.0
"""Sends what each round measured to TensorBoard and MLflow (`spec.tracking`), during a run and at its end.

A tracker that fails never stops a run: what it lacks is sent with the next round, or by `fedpipe run` again.
"""

import asyncio
import importlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from fedpipe_api.base import UserError
from fedpipe_api.job import Phase
from fedpipe_api.tracking import MLflow

from ..engine import Engine
from ..engine.background import uninterrupted
from ..engine.state import JobState
from . import measures
from .directory import History, RunDirectory, RunRecord

log = logging.getLogger(__name__)

_ROUND = (
    "loss", "accuracy", "perplexity", "updates", "seconds", "bytesUp", "bytesDown", "underTraining",
    "relativeError", "effectiveRank",
)  # fmt: skip
_NODE = ("loss", "accuracy", "perplexity", "trainLoss", "steps", "stepSeconds", "peakBytes", "updateNorm")
_BATCH = 1000
"""Metrics of one request, as MLflow's REST API takes them."""
_PARAMETERS = 100
"""And parameters."""
_REQUEST_SECONDS = "10"

Times = Mapping[int, float]
"""When each round was done, in seconds since the epoch."""


class Tracker(Protocol):
    """What keeps a run's measurements elsewhere."""

    place: str

    def send(self, rows: list[measures.RoundRow], times: Times) -> None:
        """Send the rows that it lacks."""

    def end(self, phase: Phase | None) -> None:
        """Say how the run ended; None where it stopped and may go on."""


class Tracking:
    """A run's trackers. `failed` says of each that lacks rows why."""

    def __init__(self, directory: RunDirectory, record: RunRecord) -> None:
        """Find the libraries; UserError names one that is missing. Nothing is written or sent yet."""
        wanted = record.job.spec.tracking
        self._trackers: list[Tracker] = []
        self.failed: dict[str, str] = {}
        if wanted is not None and wanted.tensor_board:
            self._trackers.append(TensorBoard(directory))
        if wanted is not None and wanted.mlflow is not None:
            self._trackers.append(MLflowRun(wanted.mlflow, record))

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._trackers)

    @property
    def places(self) -> list[str]:
        """Where those that have all rows keep them."""
        return [tracker.place for tracker in self._trackers if tracker.place not in self.failed]

    def send(self, rows: list[measures.RoundRow], times: Times) -> None:
        """Send the rows that trackers lack."""
        for tracker in self._trackers:
            self._try(tracker, lambda tracker=tracker: tracker.send(rows, times))

    def end(self, phase: Phase | None) -> None:
        """Say how the run ended."""
        for tracker in self._trackers:
            if tracker.place not in self.failed:
                self._try(tracker, lambda tracker=tracker: tracker.end(phase))

    def _try(self, tracker: Tracker, send: Any) -> None:
        try:
            send()
        except Exception as error:  # a server and its client may fail in every way
            why = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            self.failed[tracker.place] = why
            log.warning("%s: %s", tracker.place, why)
        else:
            self.failed.pop(tracker.place, None)

    async def follow(self, engine: Engine, uid: str) -> None:
        """Send each round once the next is done, which evaluates it; until cancelled."""
        sent = 0
        while True:
            state = engine.jobs[uid].state
            if state.done > sent:
                rows, sent = measures.rounds(History(state, 0.0))[:-1], state.done
                await uninterrupted(asyncio.to_thread(self.send, rows, times(state)))
            await engine.moved(uid, 60.0)


def times(state: JobState) -> Times:
    """Return when each round was done; 0 is the untrained start."""
    done = {number: known.result_at for number, known in state.rounds.items() if known.result_at is not None}
    begun = state.rounds[1].opened_at if 1 in state.rounds else state.submitted_at
    return {0: begun} | done


def figures(row: measures.RoundRow) -> Iterator[tuple[str, float]]:
    """Yield a row's measurements as trackers name them: `round/loss`, `trainLoss/NODE`."""
    for name in _ROUND:
        if row.get(name) is not None:
            yield f"round/{name}", float(row[name])
    for node, measured in row.get("nodes", {}).items():
        for name in _NODE:
            if measured.get(name) is not None:
                yield f"{name}/{node}", float(measured[name])


def _library(name: str, package: str, field: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"spec.tracking.{field}: needs {package}; pip install {package}") from None


class TensorBoard:
    """An event file, rewritten by a process that resumes a run: a second file would show rounds twice."""

    def __init__(self, directory: RunDirectory) -> None:
        self._library = _library("tensorboardX", "tensorboardX", "tensorBoard")
        self._path = directory.root / "tensorboard"
        self._complete = self._path / "complete"
        self._writer: Any = None
        self._sent = 0
        self.place = str(self._path)

    def send(self, rows: list[measures.RoundRow], times: Times) -> None:
        """Write the rows after those that were written."""
        if self._complete.exists():
            return
        if self._writer is None:
            shutil.rmtree(self._path, ignore_errors=True)
            self._writer = self._library.SummaryWriter(logdir=self.place)
        for row in rows[self._sent :]:
            for name, value in figures(row):
                self._writer.add_scalar(name, value, row["round"], walltime=times[row["round"]])
        self._sent = max(self._sent, len(rows))
        self._writer.flush()

    def end(self, phase: Phase | None) -> None:
        """Close the file, and mark that of a run which has ended."""
        if self._writer is not None:
            self._writer.close()
            if phase is not None:
                self._complete.touch()


class MLflowRun:
    """A run of an experiment, found again by the uid of ours."""

    def __init__(self, wanted: MLflow, record: RunRecord) -> None:
        # Read at import. It would report its use to its makers, try for minutes what fails, and refuse a
        # directory of runs.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", _REQUEST_SECONDS)
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        mlflow = _library("mlflow", "mlflow-skinny", "mlflow")
        self._entities = importlib.import_module("mlflow.entities")
        self._record = record
        self._experiment = wanted.experiment or record.job.metadata.name
        self._run: str | None = None
        self._sent = 0
        self.place = f"{wanted.uri} experiment {self._experiment}"
        self._client = mlflow.MlflowClient(tracking_uri=wanted.uri)
        try:
            self._client.search_experiments(max_results=1)
        except Exception as error:
            why = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise UserError(f"spec.tracking.mlflow.uri: {wanted.uri} cannot be used: {why}") from None

    def send(self, rows: list[measures.RoundRow], times: Times) -> None:
        """Log the rows after those that were logged."""
        run = self._run or self._open()
        for row in rows[self._sent :]:
            at, number = int(1000 * times[row["round"]]), row["round"]
            found = [self._entities.Metric(name, value, at, number) for name, value in figures(row)]
            for first in range(0, len(found), _BATCH):
                self._client.log_batch(run, metrics=found[first : first + _BATCH])
        if len(rows) > self._sent:
            self._sent = len(rows)
            self._client.set_tag(run, "fedpipe.rows", str(self._sent))

    def end(self, phase: Phase | None) -> None:
        """Say whether the run succeeded; one that stopped goes on as it is."""
        if phase is not None and self._run is not None:
            self._client.set_terminated(self._run, "FINISHED" if phase is Phase.SUCCEEDED else "FAILED")

    def _open(self) -> str:
        """Return the id of the run, which an earlier process may have begun."""
        client, name, uid = self._client, self._experiment, self._record.uid
        known = client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else client.create_experiment(name)
        begun = client.search_runs([experiment], f"tags.`fedpipe.uid` = '{uid}'", max_results=1)
        if begun:
            self._sent = int(begun[0].data.tags.get("fedpipe.rows", 0))
            self._run = str(begun[0].info.run_id)
            return self._run
        tags = {"fedpipe.uid": uid}
        run = client.create_run(experiment, run_name=self._record.job.metadata.name, tags=tags)
        found = [self._entities.Param(key, value) for key, value in parameters(self._record)]
        for first in range(0, len(found), _PARAMETERS):
            client.log_batch(run.info.run_id, params=found[first : first + _PARAMETERS])
        self._run = str(run.info.run_id)
        return self._run


def parameters(record: RunRecord) -> Iterator[tuple[str, str]]:
    """Yield what a run is compared by: model, nodes, and what of the spec decides what is computed."""
    spec = record.job.spec.to_dict()
    yield "model.name", record.model[-500:]
    yield "fleet.nodes", str(len(record.fleet.nodes))
    yield "model.task", str(record.job.spec.model.task)
    for part in ("rounds", "adapter", "optimizer", "aggregation"):
        yield from _leaves(part, spec.get(part, {}))
    for name in ("quantization", "seed"):
        yield name, str(spec.get(name, getattr(record.job.spec, name)))


def _leaves(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(f"{path}.{name}", inner)
    else:
        yield path[:250], (", ".join(map(str, value)) if isinstance(value, list) else str(value))[:500]
