# SPDX-License-Identifier: Apache-2.0
"""Measuring the link: what gives a rate, whom it trusts, and what it says when there is none."""

import contextlib
import http.server
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedpipe_agent.probe import link, loop
from fedpipe_agent.probe.child import Child
from fedpipe_agent.probe.link import LinkError
from fedpipe_agent.probe.loop import Coordinator, Link
from fedpipe_operator.kube.tls import renew
from nvml import apiserver
from nvml.running import running, until
from nvml.standin import StandIn, standin

__all__ = ["standin"]

# The servers of these tests are threads; the probe itself has none when it forks.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@contextlib.contextmanager
def files(size: int, status_code: int, context: ssl.SSLContext | None = None, port: int = 0) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.headers["Range"] == f"bytes=0-{link.SAMPLE_BYTES - 1}"
            assert "Authorization" not in self.headers
            self.send_response(status_code)
            self.end_headers()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(bytes(size))

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        host = "localhost" if context else "127.0.0.1"
        yield f"http{'s' if context else ''}://{host}:{server.server_port}/sample?x=1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def talker(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """Serve connections that `talk` is given, one at a time."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection, contextlib.suppress(OSError):
                    talk(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/x"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()


@pytest.mark.parametrize(
    ("size", "code"),
    [(link.MEANINGFUL_BYTES, 200), (link.SAMPLE_BYTES, 206), (4 * link.SAMPLE_BYTES, 200)],
)
def test_a_download_tells_the_rate(size: int, code: int) -> None:
    with files(size, code) as url:
        assert link.measure(url) > 0


@pytest.mark.parametrize(
    ("size", "code", "why"),
    [
        (link.MEANINGFUL_BYTES - 1, 206, "65535 bytes are too few; at least 65536 are needed"),
        (0, 200, "^0 bytes are too few; at least 65536 are needed"),
        (link.SAMPLE_BYTES, 404, "it answered 404 Not Found"),
    ],
)
def test_what_is_no_meaningful_download_tells_none(size: int, code: int, why: str) -> None:
    with files(size, code) as url, pytest.raises(LinkError, match=why):
        link.measure(url)


def test_a_coordinator_that_is_not_there_has_no_link_rate() -> None:
    with pytest.raises(LinkError, match="refused"):
        link.measure("http://127.0.0.1:1/")


@pytest.mark.parametrize("url", ["http://h/ä", "http://a..b/x", f"http://{'a' * 64}/x", "http://h/a b"])
def test_a_url_that_cannot_be_asked_for_tells_none(url: str) -> None:
    with pytest.raises(LinkError):
        link.measure(url)


def test_headers_that_never_end_are_given_up_on() -> None:
    def trickle(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        pause = threading.Event()
        while not pause.wait(0.05):
            connection.sendall(b"X-A: b\r\n")

    with talker(trickle) as url, pytest.raises(LinkError, match="no answer within"):
        link.measure(url, child=Child(0.5))


def test_a_coordinator_with_its_own_authority_is_trusted_by_it(tmp_path: Path, standin: StandIn) -> None:
    material = renew(None, ["localhost"], datetime.now(UTC))
    ca, crt, key = (tmp_path / name for name in ("ca.crt", "tls.crt", "tls.key"))
    ca.write_text(material.bundle)
    crt.write_bytes(material.tls_crt)
    key.write_bytes(material.tls_key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(crt, key)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (
        files(link.SAMPLE_BYTES, 206, context) as url,
        apiserver.serve(tmp_path) as api,
        running(
            api.cluster(),
            standin.environment,
            "--coordinator",
            url,
            "--ca-file",
            str(ca),
            "--interval",
            "100ms",
            port=port,
        ) as probe,
    ):
        until(lambda: api.writes)
        until(lambda: api.writes[-1].get("linkRate", 0) > 0)
        _, log = probe.stop()
    assert "cannot be measured" not in log
    with files(link.SAMPLE_BYTES, 206, context) as url:
        with pytest.raises(LinkError, match="CERTIFICATE_VERIFY_FAILED") as refusal:
            link.measure(url)
        assert str(refusal.value).endswith("; name its authority with --ca-file")
        assert "_ssl.c" not in str(refusal.value)
        with pytest.raises(LinkError, match=r"nowhere\.crt: No such file"):
            link.measure(url, tmp_path / "nowhere.crt")
        with pytest.raises(LinkError, match=f"{tmp_path}: Is a directory"):
            link.measure(url, tmp_path)
        assert link.measure(url, ca) > 0
        done = standin.probe("--once", "--output", "json", "--coordinator", url, "--ca-file", str(ca))
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["status"]["linkRate"] > 0
        done = standin.probe("--once", "--output", "json", "--coordinator", url)
    assert done.returncode == 0
    assert "linkRate" not in json.loads(done.stdout)["status"]
    assert "cannot be measured: " in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_trouble_and_its_end_are_each_reported_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loop, "LINK_RETRY", 0.0)
    monkeypatch.setattr(loop, "LINK_INTERVAL", 0.0)
    caplog.set_level("INFO", "fedpipe.probe")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    measured = Link(Coordinator(f"http://127.0.0.1:{port}/sample"))
    assert [measured.look(), measured.look()] == [None, None]
    with files(link.SAMPLE_BYTES, 206, port=port):
        assert all([measured.look(), measured.look()])
    assert measured.look() is None
    reported = [
        record.message.removeprefix(f"the link to http://127.0.0.1:{port}/sample ")
        for record in caplog.records
    ]
    refused = "cannot be measured: [Errno 111] Connection refused"
    assert reported == [refused, "is measured", refused]


def test_the_rate_is_kept_until_it_is_measured_again() -> None:
    with files(link.SAMPLE_BYTES, 206) as url:
        measured = Link(Coordinator(url))
        rate = measured.look()
    assert rate
    assert measured.look() == rate
    assert Link(None).look() is None


def test_what_an_earlier_probe_measured_holds_until_the_first_measurement() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    measured = Link(Coordinator(f"http://127.0.0.1:{port}/sample"), 5_000_000)
    assert measured.rate == 5_000_000
    assert measured.look() is None
    assert Link(None, 5_000_000).look() is None


def test_authorities_that_are_not_there_yet_keep_the_loop_from_nothing_but_the_rate(
    tmp_path: Path, standin: StandIn
) -> None:
    ca = tmp_path / "later.crt"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ("--coordinator", "https://127.0.0.1:1/x", "--ca-file", str(ca), "--interval", "100ms")
    with (
        apiserver.serve(tmp_path) as api,
        running(api.cluster(), standin.environment, *arguments, port=port) as probe,
    ):
        until(lambda: probe.metric("fedpipe_probe_passes_total") > 1)
        code, log = probe.stop()
    assert (code, len(api.writes)) == (0, 1)
    assert f"cannot be measured: {ca}: No such file or directory" in log
