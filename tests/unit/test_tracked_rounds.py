# SPDX-License-Identifier: Apache-2.0
"""The rounds that a cluster's tracker Pod fetches: whole, in order, in pages, through restarts of either side."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedpipe_api.base import UserError
from fedpipe_operator.kube import track
from fedpipe_operator.kube.own_requests import Coordinator
from fedpipe_operator.local.results import read
from fedpipe_operator.tracking import page as pages
from fedpipe_operator.tracking.page import page
from fedpipe_operator.tracking.rows import rounds, times
from unit.test_local_report import make_run

ROUNDS = 6


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    return read(make_run(tmp_path_factory.mktemp("tracked") / "run", rounds=ROUNDS)).state


@pytest.mark.parametrize("room", [1, 5, 500])
def test_pages_are_the_rounds_of_the_report(state, monkeypatch, room):
    monkeypatch.setattr(pages, "NODE_ROWS", room)
    after, found, when = -1, [], {}
    while True:
        one = page(state, after)
        assert one.subject.uid == state.uid
        found += one.rounds
        when |= one.times
        assert (one.phase is None) == one.more, "the end is reported with the last of them"
        if not one.more:
            break
        assert one.rounds, "each page brings the reader forward"
        after = one.rounds[-1]["round"]
    assert found == rounds(state)
    assert when == {row["round"]: times(state)[row["round"]] for row in found}
    assert not page(state, ROUNDS).rounds
    assert page(state, ROUNDS).phase is state.finished.phase


def test_a_round_that_the_next_has_not_evaluated_waits(state, monkeypatch):
    monkeypatch.setattr(state, "finished", None)
    one = page(state, -1)
    assert [row["round"] for row in one.rounds] == list(range(ROUNDS))
    assert one.phase is None
    assert not one.more


def test_what_jobs_are_compared_by_names_the_model_and_no_data(state):
    about = page(state, -1).subject.parameters
    assert about["model.name"] == "/base"
    assert about["fleet.nodes"] == "4"
    assert not any("data" in name or "podTemplate" in name for name in about)


class Rounds(HTTPServer):
    """Plays the coordinator; the answers of `trouble` come first."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            url = urlsplit(self.path)
            after = int(parse_qs(url.query)["after"][0])
            self.server.asked.append(after)
            status, body = 200, page(self.server.state, after).to_json().encode()
            if self.server.trouble:
                status, body = self.server.trouble.pop(0)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    def __init__(self, state, directory):
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.state, self.asked, self.trouble = state, [], []
        self._thread = threading.Thread(target=self.serve_forever)
        self._thread.start()
        (directory / "token").write_text("token\n")
        url = f"http://127.0.0.1:{self.server_port}"
        self.coordinator = Coordinator(url, directory / "token", directory / "ca.crt")

    def close(self):
        self.shutdown()
        self._thread.join()
        self.server_close()


@pytest.fixture
def served(state, tmp_path, monkeypatch):
    monkeypatch.setattr(track, "POLL_SECONDS", 0.01)
    # Over plain HTTP there is no certificate to check.
    monkeypatch.setattr("ssl.create_default_context", lambda **_: None)
    one = Rounds(state, tmp_path)
    yield one
    one.close()


def test_every_round_is_sent_once_through_restarts_of_both_sides(served, state, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "NODE_ROWS", 5)
    runs = (tmp_path / "runs").as_uri()
    targets = track.Targets(tmp_path / "events", runs, "shared")
    served.trouble = [(503, b""), (429, b"")]
    send = track.Trackers.send

    def broken(trackers, rows, when):
        send(trackers, rows, when)
        if len(served.asked) == 5:
            trackers.failed["MLflow"] = "it is away"

    monkeypatch.setattr(track.Trackers, "send", broken)
    with pytest.raises(UserError, match="MLflow: it is away"):
        track.track(served.coordinator, targets)
    monkeypatch.setattr(track.Trackers, "send", send)
    track.track(served.coordinator, targets)  # as the kubelet starts it again
    board = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [event.step for event in board.Scalars("round/loss")] == list(range(ROUNDS + 1))
    client = MlflowClient(runs)
    [run] = client.search_runs([client.get_experiment_by_name("shared").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == state.name
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "round/loss")] == list(
        range(ROUNDS + 1)
    )


@pytest.mark.parametrize(
    ("answer", "message"),
    [((401, b"{}"), "401"), ((200, b"{"), "rounds"), ((200, b'{"rounds": 1}'), "rounds")],
)
def test_an_answer_that_is_no_page_ends_it_in_one_line(served, tmp_path, answer, message):
    served.trouble = [answer]
    with pytest.raises(UserError, match=message) as caught:
        track.track(served.coordinator, track.Targets(tmp_path / "events", None, None))
    assert "\n" not in str(caught.value)


def test_events_of_an_earlier_job_of_the_same_name_are_replaced(served, state, tmp_path):
    targets = track.Targets(tmp_path / "events", None, None)
    track.track(served.coordinator, targets)
    before = sorted(path.name for path in targets.tensorboard.iterdir())
    track.track(served.coordinator, targets)
    assert sorted(path.name for path in targets.tensorboard.iterdir()) == before, "it is complete"
    (targets.tensorboard / "complete").write_text("another uid")
    track.track(served.coordinator, targets)
    assert (targets.tensorboard / "complete").read_text() == state.uid
    board = EventAccumulator(str(targets.tensorboard)).Reload()
    assert len(board.Scalars("round/loss")) == ROUNDS + 1
