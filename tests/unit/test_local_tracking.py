# SPDX-License-Identifier: Apache-2.0
"""`spec.tracking`: what TensorBoard and MLflow read of a run."""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedpipe_api.base import UserError
from fedpipe_api.job import FedPipeJob
from fedpipe_operator.local.results import read, write_all_results
from fedpipe_operator.local.tracking import trackers_of
from fedpipe_operator.tracking.rows import rounds, times
from fedpipe_operator.tracking.trackers import parameters
from unit.test_local_report import make_run

ROUNDS = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("tracked") / "run", rounds=ROUNDS)


def record_of(run, **tracking):
    """Return the run's record with a job that wants it tracked."""
    record = run.read_record()
    job = record.job.to_dict()
    job["spec"]["tracking"] = tracking
    return record.model_copy(update={"job": FedPipeJob.model_validate(job)})


def scalars(path, name):
    """Return step to value, as TensorBoard reads them; each step once."""
    board = EventAccumulator(str(path)).Reload()
    found = [(event.step, event.value) for event in board.Scalars(name)]
    assert len(found) == len(dict(found))
    return dict(found)


def test_tensorboard_reads_each_round_once(run):
    state = read(run).state
    rows = rounds(state)
    record = record_of(run, tensorBoard=True)
    for end in (None, state.finished.phase):  # as of a run that was stopped and goes on
        trackers = trackers_of(run, record)
        for known in (3, 5, 5, len(rows)):
            trackers.send(rows[:known], times(state))
            found = scalars(run.root / "tensorboard", "round/loss")
            assert found == pytest.approx({row["round"]: row["loss"] for row in rows[:known]}, rel=1e-6)
        trackers.end(end)
        assert not trackers.failed
    trained = scalars(run.root / "tensorboard", "trainLoss/edge-d")
    assert sorted(trained) == [1, 3, 4, 5, 6], "it missed round 2"
    assert trained[6] == pytest.approx(rows[6]["nodes"]["edge-d"]["trainLoss"])
    board = EventAccumulator(str(run.root / "tensorboard")).Reload()
    left = list((run.root / "tensorboard").iterdir())
    again = trackers_of(run, record)
    again.send(rows, times(state))
    again.end(state.finished.phase)
    assert list((run.root / "tensorboard").iterdir()) == left, "a run that has ended is complete"
    assert board.Scalars("round/seconds")[0].wall_time == pytest.approx(state.rounds[1].result_at)


def test_mlflow_has_one_run_with_parameters_and_each_round_once(run, tmp_path):
    state = read(run).state
    rows = rounds(state)
    uri = (tmp_path / "runs").as_uri()
    record = record_of(run, mlflow={"uri": uri, "experiment": "tickets by site"})
    for known in (4, len(rows)):  # a process each
        trackers = trackers_of(run, record)
        trackers.send(rows[:known], times(state))
    trackers.end(state.finished.phase)
    assert not trackers.failed
    assert trackers.places == [f"{uri} experiment tickets by site"]
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tickets by site")
    [found] = client.search_runs([experiment.experiment_id])
    assert (found.info.status, found.info.run_name) == ("FINISHED", "tickets")
    assert found.data.tags["fedpipe.uid"] == record.uid
    assert found.data.params["rounds.count"] == "12"
    assert found.data.params["optimizer.learningRate"] == "0.001"
    assert found.data.params["fleet.nodes"] == "1"
    for name in ("loss", "accuracy", "bytesUp"):
        history = client.get_metric_history(found.info.run_id, f"round/{name}")
        expected = {row["round"]: row[name] for row in rows if row.get(name) is not None}
        assert {metric.step: metric.value for metric in history} == pytest.approx(expected)
        assert len(history) == len(expected)
    first = client.get_metric_history(found.info.run_id, "round/seconds")[0]
    assert first.timestamp == int(1000 * state.rounds[1].result_at)


class Server(HTTPServer):
    """Answers every request of MLflow's REST API with an empty object, until it is closed."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_GET = do_POST

        def log_message(self, *_):
            pass

    def __init__(self):
        super().__init__(("127.0.0.1", 0), self.Handler)
        self._thread = threading.Thread(target=self.serve_forever)
        self._thread.start()
        self.uri = f"http://127.0.0.1:{self.server_port}"

    def close(self):
        self.shutdown()
        self._thread.join()
        self.server_close()


def test_a_server_that_goes_away_costs_neither_the_run_nor_the_other_tracker(tmp_path, capsys):
    run = make_run(tmp_path / "run", rounds=2)
    server = Server()
    try:
        trackers = trackers_of(run, record_of(run, tensorBoard=True, mlflow={"uri": server.uri}))
    finally:
        server.close()
    assert write_all_results(run, trackers) == 0
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith(f"spec.tracking: {server.uri} experiment tickets lacks rounds: ")
    assert lines[0].endswith("; the same command sends them")
    assert f"tracked  {run.root / 'tensorboard'}" in said.out.splitlines()
    assert sorted(scalars(run.root / "tensorboard", "round/accuracy")) == [0, 1, 2]


def test_a_server_that_is_not_there_is_named_before_anything_runs(run):
    server = Server()
    server.close()
    begin = time.monotonic()
    with pytest.raises(
        UserError, match=rf"^spec\.tracking\.mlflow\.uri: {server.uri} cannot be used: .*"
    ) as caught:
        trackers_of(run, record_of(run, mlflow={"uri": server.uri}))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize(
    ("library", "tracking", "message"),
    [
        ("tensorboardX", {"tensorBoard": True}, "spec.tracking.tensorBoard: needs tensorboardX; pip install tensorboardX"),
        ("mlflow", {"mlflow": {"uri": "file:///x"}}, "spec.tracking.mlflow: needs mlflow-skinny; pip install mlflow-skinny"),
    ],
)  # fmt: skip
def test_a_library_that_is_missing_is_named(run, monkeypatch, library, tracking, message):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError) as caught:
        trackers_of(run, record_of(run, **tracking))
    assert str(caught.value) == message


def test_what_decides_nothing_and_secrets_are_no_parameters(run):
    record = run.read_record()
    sent = json.dumps(dict(parameters(record.job.spec, record.model, 1)))
    assert "/data" not in sent
    assert "podTemplate" not in sent
