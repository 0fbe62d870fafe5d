"""Checks that the operator is ready, serves its metrics, and refuses strangers over TLS."""

import socket
import ssl
import sys
import urllib.request

web, coordinator = sys.argv[1:]
for path, wanted in (("/readyz", b""), ("/metrics", b"fedpipe_operator_")):
    with urllib.request.urlopen(web + path, timeout=10) as answer:  # noqa: S310 - the URL is the chart's own
        if wanted not in answer.read():
            sys.exit(f"{web}{path}: no {wanted.decode()} in the answer")
# Whose certificate it is matters to agents, which know the CA; here only that somebody speaks the protocol.
context = ssl._create_unverified_context()  # noqa: S323
host, port = coordinator.rsplit(":", 1)
with socket.create_connection((host, int(port)), 10) as raw, context.wrap_socket(raw) as link:
    link.sendall(b"GET /v1/job HTTP/1.0\r\n\r\n")
    status = link.recv(64).split(b"\r\n")[0]
if b" 401 " not in status + b" ":
    sys.exit(f"{coordinator}: asked without a token it answers {status!r}, not 401")
print("the operator is ready, serves its metrics and refuses strangers")  # noqa: T201
