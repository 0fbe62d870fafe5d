# SPDX-License-Identifier: Apache-2.0
"""Whatever is sent is refused in one line, and logged in one line, never a traceback."""

import re
from pathlib import Path

from fedpipe_api.logs import one_line
from standins.coordinator_process import ask, serving
from standins.raw_http import request

FORGED = "%0a2026-11-29 00:00:00,000 INFO fedpipe_operator: all is well%1b[2J%c2%85%e2%80%a8"


ROWS = [
        (request("GET /v1/job", b"\xff\xfe\x80"), {400}),
        (request("GET /v1/job", "no-such/token"), {401}),
        (request("GET /v1/job", None, "Authorization: Basic x"), {401}),
        (request("GET /v1/blobs/" + 64 * "0", "job-0/node-0", "Range: bytes=5-1"), {416}),
        (request("GET /v1/blobs/" + 64 * "0", "job-0/node-0", "Range: chunks=1"), {416}),
        (request("GET /v1/blobs/" + 64 * "0", "job-0/node-0", "Range: bytes=" + 5000 * "9" + "-"), {416}),
        (
            request(
                "GET /v1/blobs/" + 64 * "0",
                "job-0/node-0",
                "If-Modified-Since: Mon, 01 Jan 99999999999999999999 00:00:00 GMT",
            ),
            {400},
        ),
        (request("GET /v1/blobs/" + FORGED.replace(" ", "%20")), {404}),
        (request("GET /%00%ff%fe"), {404}),
        (request("GET /v1/assignment?wait=%0a%ff"), {400}),
        (request("GET /v1/assignment?wait=nan"), {200, 204}),
        (request("PUT /v1/rounds/" + 400 * "9" + "/update"), {400, 404, 422}),
        (request("POST /v1/agents", "job-0/node-0", "Content-Length: 1", "Content-Encoding: gzip", body=b"x"), {415}),
        (request("POST /v1/agents", "job-0/node-0", "Transfer-Encoding: chunked", body=b"zz\r\n"), {400}),
        (request("POST /v1/agents", None, "Transfer-Encoding: chunked", body=b"5\r\nabcde\r\nzz\r\n"), {400, 401}),
        (request("POST /v1/agents", "job-0/node-0", "Content-Length: -1"), {400}),
        (request("POST /v1/agents", "job-0/node-0", "Content-Length: " + 5000 * "9"), {400, 413}),
        (request("GET /v1/job", "job-0/node-0", "Expect: a-miracle"), {417}),
        (request("DELETE /v1/job"), {405}),
        (b"\x16\x03\x01\x00\xff\x00\r\n\r\n", {400}),
        (b"GET / HTTP/9.9\r\n\r\n", {400, 401, 404}),
        (request("GET /v1/job", "job-0/node-0", "X-Long: " + 40000 * "a"), {400}),
]  # fmt: skip


async def test_whatever_is_sent_is_refused_in_one_line(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        for sent, statuses in ROWS:
            status, body = await ask(server, sent)
            assert status in statuses, (sent[:200], body)
            assert b"Traceback" not in body
            assert not body.startswith(b"{") or b"\n" not in body
    lines = server.log.read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 10
    for line in lines:
        assert re.match(r"\d{4}-\d\d-\d\d [\d:,]+ [A-Z]+ [\w.]+: ", line), line
        assert not line.startswith("2026-11-29 00:00:00,000 INFO fedpipe_operator: all is well")


def test_one_line_keeps_text_and_escapes_what_moves_it() -> None:
    assert one_line("straße, 東京 ok") == "straße, 東京 ok"
    assert one_line("a\nb\r\x1b[0m\u2028\u202e\x85\ud800") == r"a\nb\r\x1b[0m\u2028\u202e\x85\ud800"
