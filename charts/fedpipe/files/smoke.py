# SPDX-License-Identifier: Apache-2.0
"""Says whether the operator is ready, and that it refuses agents and readers without a token.

Services lead to Pods that are ready, so an answer at all is the operator's word that it is.
"""

import socket
import ssl
import sys

# Whose certificate it is matters to those who send a token; here only that somebody speaks the protocol.
CONTEXT = ssl._create_unverified_context()  # noqa: S323

for target in sys.argv[1:]:
    place, _, path = target.partition("/")
    host, port = place.rsplit(":", 1)
    with socket.create_connection((host, int(port)), 10) as raw, CONTEXT.wrap_socket(raw) as link:
        link.sendall(f"GET /{path} HTTP/1.0\r\n\r\n".encode())
        status = link.recv(64).split(b"\r\n")[0]
    if b" 401 " not in status + b" ":
        sys.exit(f"{target}: asked without a token it answers {status!r}, not 401")
print("the operator is ready and refuses strangers")  # noqa: T201
