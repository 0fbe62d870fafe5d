# SPDX-License-Identifier: Apache-2.0
"""A probe whose API server or coordinator accepts and says nothing still ends when it is asked to."""

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpipe_agent.probe import link, publish
from nvml import apiserver
from nvml.running import running, until
from nvml.standin import StandIn, standin

__all__ = ["standin"]

GRACE = 5.0
"""Seconds that the chart gives the probe's Pod to end."""


class Silent:
    """Accepts connections and never answers; `called` is set by the first that sends something."""

    def __init__(self) -> None:
        self.called = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                held.enter_context(connection)
                if connection.recv(65536):
                    self.called.set()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()


@pytest.fixture
def silent() -> Iterator[Silent]:
    server = Silent()
    yield server
    server.close()


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_silent_api_server_does_not_keep_it(
    silent: Silent, standin: StandIn, tmp_path: Path, port: int, number: signal.Signals
) -> None:
    assert publish.TIMEOUT > GRACE
    token = tmp_path / "token"
    token.write_text(apiserver.token())
    with running(publish.Cluster(silent.url, token, None), standin.environment, port=port) as probe:
        assert silent.called.wait(20)
        probe.process.send_signal(number)
        _, log = probe.process.communicate(timeout=GRACE)
    assert probe.process.returncode == 0
    assert "Traceback" not in log


def test_an_api_server_that_falls_silent_does_not_keep_it(
    silent: Silent, standin: StandIn, tmp_path: Path, port: int
) -> None:
    # The first question, for what an earlier probe wrote, finds nobody; the first write finds silence.
    token = tmp_path / "token"
    cluster = publish.Cluster(silent.url, token, None)
    with running(cluster, standin.environment, "--interval", "100ms", port=port) as probe:
        until(lambda: 'reason="NoToken"' in probe.metrics())
        token.write_text(apiserver.token())
        assert silent.called.wait(40)
        probe.process.send_signal(signal.SIGTERM)
        _, log = probe.process.communicate(timeout=GRACE)
    assert probe.process.returncode == 0
    assert "Traceback" not in log


def test_a_silent_coordinator_keeps_neither_the_first_report_nor_scrapes_nor_the_end(
    silent: Silent, standin: StandIn, tmp_path: Path, port: int
) -> None:
    assert link.DEADLINE > GRACE
    with (
        apiserver.serve(tmp_path) as api,
        running(api.cluster(), standin.environment, "--coordinator", f"{silent.url}/x", port=port) as probe,
    ):
        assert silent.called.wait(20)
        assert len(api.writes) == 1
        assert "fedpipe_probe" in probe.metrics()
        probe.process.send_signal(signal.SIGTERM)
        _, log = probe.process.communicate(timeout=GRACE)
        assert len(api.writes) == 1
    assert probe.process.returncode == 0
    assert "Traceback" not in log
    assert "cannot be measured" not in log
