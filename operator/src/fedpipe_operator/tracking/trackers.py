# SPDX-License-Identifier: Apache-2.0
"""Sends rows of rounds to TensorBoard and MLflow.

A tracker that fails stops nothing: what it lacks is sent with the next rows, or by the next process.
"""

import importlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fedpipe_api.base import Model, UserError
from fedpipe_api.job import FedPipeJobSpec, Phase
from fedpipe_api.tracking import MLflow

from .rows import RoundRow, Times

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
_LATEST = "fedpipe.round"
"""The tag with the latest round that was logged whole."""


class Subject(Model):
    """The job that is tracked. `parameters` are what it is compared with others by."""

    uid: str
    name: str
    parameters: dict[str, str]


class Tracker(Protocol):
    """What keeps a job's measurements elsewhere."""

    place: str

    def send(self, rows: Sequence[RoundRow], times: Times) -> None:
        """Send the rows, in order of their rounds, that it lacks."""

    def end(self, phase: Phase | None) -> None:
        """Say how the job ended; None where it stopped and may go on."""


class Trackers:
    """A job's trackers. `failed` says of each that lacks rows why."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers
        self.failed: dict[str, str] = {}

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._trackers)

    @property
    def places(self) -> list[str]:
        """Where those that have all rows keep them."""
        return [tracker.place for tracker in self._trackers if tracker.place not in self.failed]

    def send(self, rows: Sequence[RoundRow], times: Times) -> None:
        """Send the rows that trackers lack."""
        for tracker in self._trackers:
            self._try(tracker, lambda tracker=tracker: tracker.send(rows, times))

    def end(self, phase: Phase | None) -> None:
        """Say how the job ended."""
        for tracker in self._trackers:
            if tracker.place not in self.failed:
                self._try(tracker, lambda tracker=tracker: tracker.end(phase))

    def _try(self, tracker: Tracker, send: Any) -> None:
        try:
            send()
        except Exception as error:  # a server and its client may fail in every way
            self.failed[tracker.place] = why = _first_line(error)
            log.warning("%s: %s", tracker.place, why)
        else:
            self.failed.pop(tracker.place, None)


def figures(row: RoundRow) -> Iterator[tuple[str, float]]:
    """Yield a row's measurements as trackers name them: `round/loss`, `trainLoss/NODE`."""
    for name in _ROUND:
        if row.get(name) is not None:
            yield f"round/{name}", float(row[name])
    for node, measured in row.get("nodes", {}).items():
        for name in _NODE:
            if measured.get(name) is not None:
                yield f"{name}/{node}", float(measured[name])


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def _library(name: str, package: str, field: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"spec.tracking.{field}: needs {package}; pip install {package}") from None


class TensorBoard:
    """An event file, rewritten by the next process of a job: a second file would show rounds twice."""

    def __init__(self, path: Path, uid: str) -> None:
        self._library = _library("tensorboardX", "tensorboardX", "tensorBoard")
        self._path = path
        self._uid = uid
        self._complete = path / "complete"
        self._writer: Any = None
        self._latest = -1
        self.place = str(path)

    def send(self, rows: Sequence[RoundRow], times: Times) -> None:
        """Write the rows after those that were written."""
        # An earlier job of the same name may have left its own.
        if self._complete.is_file() and self._complete.read_text(encoding="utf-8") == self._uid:
            return
        if self._writer is None:
            shutil.rmtree(self._path, ignore_errors=True)
            self._writer = self._library.SummaryWriter(logdir=self.place)
        for row in _after(self._latest, rows):
            for name, value in figures(row):
                self._writer.add_scalar(name, value, row["round"], walltime=times[row["round"]])
            self._latest = row["round"]
        self._writer.flush()

    def end(self, phase: Phase | None) -> None:
        """Close the file, and mark that of a run which has ended."""
        if self._writer is not None:
            self._writer.close()
            if phase is not None:
                self._complete.write_text(self._uid, encoding="utf-8")


class MLflowRun:
    """A run of an experiment, found again by the uid of ours."""

    def __init__(self, wanted: MLflow, subject: Subject) -> None:
        # Read at import. It would report its use to its makers, try for minutes what fails, and refuse a
        # directory of runs.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", _REQUEST_SECONDS)
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        mlflow = _library("mlflow", "mlflow-skinny", "mlflow")
        self._entities = importlib.import_module("mlflow.entities")
        self._subject = subject
        self._experiment = wanted.experiment or subject.name
        self._run: str | None = None
        self._latest = -1
        self.place = f"{wanted.uri} experiment {self._experiment}"
        self._client = mlflow.MlflowClient(tracking_uri=wanted.uri)
        try:
            self._client.search_experiments(max_results=1)
        except Exception as error:
            text = f"spec.tracking.mlflow.uri: {wanted.uri} cannot be used: {_first_line(error)}"
            raise UserError(text) from None

    def send(self, rows: Sequence[RoundRow], times: Times) -> None:
        """Log the rows after those that were logged."""
        run = self._run or self._open()
        for row in _after(self._latest, rows):
            at, number = int(1000 * times[row["round"]]), row["round"]
            found = [self._entities.Metric(name, value, at, number) for name, value in figures(row)]
            for first in range(0, len(found), _BATCH):
                self._client.log_batch(run, metrics=found[first : first + _BATCH])
            self._client.set_tag(run, _LATEST, str(number))
            self._latest = number

    def end(self, phase: Phase | None) -> None:
        """Say whether the run succeeded; one that stopped goes on as it is."""
        if phase is not None and self._run is not None:
            self._client.set_terminated(self._run, "FINISHED" if phase is Phase.SUCCEEDED else "FAILED")

    def _open(self) -> str:
        """Return the id of the run, which an earlier process may have begun."""
        client, name, uid = self._client, self._experiment, self._subject.uid
        known = client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else client.create_experiment(name)
        begun = client.search_runs([experiment], f"tags.`fedpipe.uid` = '{uid}'", max_results=1)
        if begun:
            self._latest = int(begun[0].data.tags.get(_LATEST, -1))
            self._run = str(begun[0].info.run_id)
            return self._run
        tags = {"fedpipe.uid": uid}
        run = client.create_run(experiment, run_name=self._subject.name, tags=tags)
        found = [self._entities.Param(key, value) for key, value in self._subject.parameters.items()]
        for first in range(0, len(found), _PARAMETERS):
            client.log_batch(run.info.run_id, params=found[first : first + _PARAMETERS])
        self._run = str(run.info.run_id)
        return self._run


def _after(latest: int, rows: Sequence[RoundRow]) -> Iterator[RoundRow]:
    return (row for row in rows if row["round"] > latest)


def parameters(spec: FedPipeJobSpec, model: str, nodes: int) -> Iterator[tuple[str, str]]:
    """Yield what a job is compared by: model, nodes, and what of the spec decides what is computed."""
    written = spec.to_dict()
    yield "model.name", model[-500:]
    yield "fleet.nodes", str(nodes)
    yield "model.task", str(spec.model.task)
    for part in ("rounds", "adapter", "optimizer", "aggregation"):
        yield from _leaves(part, written.get(part, {}))
    for name in ("quantization", "seed"):
        yield name, str(written.get(name, getattr(spec, name)))


def _leaves(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(f"{path}.{name}", inner)
    else:
        yield path[:250], (", ".join(map(str, value)) if isinstance(value, list) else str(value))[:500]
