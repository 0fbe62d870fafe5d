# SPDX-License-Identifier: Apache-2.0
"""`Client.watch` where the API server does not answer for a while: a real HTTP server that fails as told."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

import fedpipe
from fedpipe_api.base import UserError
from fedpipe_api.job import Phase
from fedpipe_operator.kube import client as client_module

JOB = {
    "apiVersion": "fedpipe.io/v1alpha1",
    "kind": "FedPipeJob",
    "metadata": {"name": "watched", "namespace": "default"},
    "spec": {
        "model": {"hostPath": {"path": "/m"}, "task": "sequence-classification", "labels": ["a", "b"]},
        "data": {"volume": {"hostPath": {"path": "/d"}}, "train": "train.jsonl"},
        "rounds": {"count": 3},
    },
}
CLOSED = "closed"


class Scripted(BaseHTTPRequestHandler):
    """Gives one answer of the list to each request, the last one from then on: a phase, an error, or nothing."""

    answers: list[Phase | int | str]

    def do_GET(self) -> None:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer == CLOSED:
            self.close_connection = True
            return
        status = answer if isinstance(answer, int) else 200
        failed = {"kind": "Status", "message": "etcdserver: request timed out"}
        found = failed if isinstance(answer, int) else JOB | {"status": {"phase": str(answer)}}
        body = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fedpipe.Client]:
    monkeypatch.setattr(client_module, "POLL_SECONDS", 0.01)
    with ThreadingHTTPServer(("127.0.0.1", 0), Scripted) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        path = tmp_path / "kubeconfig"
        named = {"name": "one", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
        config = {
            "clusters": [named],
            "contexts": [{"name": "one", "context": {"cluster": "one", "user": "one"}}],
            "users": [{"name": "one", "user": {}}],
            "current-context": "one",
        }
        path.write_text(yaml.safe_dump(config))
        yield fedpipe.Client(kubeconfig=path)
        server.shutdown()


def phases(client: fedpipe.Client) -> list[Phase]:
    return [job.status.phase for job in client.watch("watched") if job.status and job.status.phase]


@pytest.mark.parametrize("failure", [500, 503, 429, CLOSED])
def test_a_watch_goes_on_after_an_answer_that_does_not_come(
    client: fedpipe.Client, failure: int | str, caplog: pytest.LogCaptureFixture
) -> None:
    Scripted.answers = [Phase.TRAINING, failure, failure, failure, failure, failure, Phase.SUCCEEDED]
    assert phases(client) == [Phase.TRAINING, Phase.SUCCEEDED]
    (said,) = caplog.messages  # not one a look
    assert said.endswith("; waiting for it")
    assert len(said) < 160


def test_a_watch_ends_when_the_job_is_gone_or_may_not_be_read(client: fedpipe.Client) -> None:
    for status in (403, 404):
        Scripted.answers = [Phase.TRAINING, status]
        with pytest.raises(UserError, match=str(status)):
            phases(client)


def test_a_first_look_that_fails_is_an_error_at_once(client: fedpipe.Client) -> None:
    Scripted.answers = [503, Phase.SUCCEEDED]
    with pytest.raises(UserError, match="503"):
        phases(client)


def test_a_watch_ends_after_its_patience(client: fedpipe.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "PATIENCE_SECONDS", 0.05)
    Scripted.answers = [Phase.TRAINING, 503]
    with pytest.raises(UserError, match="request timed out"):
        phases(client)
