# SPDX-License-Identifier: Apache-2.0
"""A TLS coordinator process to attack, jobs job-0 .. job-3. A token is `JOB/NODE`.

Logs go to standard error as the operator's do; it ends at SIGTERM as the operator does. `python serving.py
DIRECTORY PORT` serves in a child, once for each line of standard input, so that a restart costs no imports; it
prints `pid PID`, `ready` and, when the child ends, `exit STATUS`.
"""

import asyncio
import json
import logging
import os
import signal
import ssl
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fedpipe_api.logs import LINE_FORMAT, LineFormatter
from fedpipe_operator.coordinator import Identity, application
from fedpipe_operator.engine import Engine
from fedpipe_operator.kube.tls import load_certificate, now_utc, renew
from fedpipe_operator.serving import Limits, listen, serve
from standins.server import job

JOBS, NODES = 4, 3


async def identify(token: str) -> Identity | None:
    """Every token names its job and node."""
    name, slash, node = token.partition("/")
    return Identity(name, node) if slash and name.startswith("job-") else None


def certificate() -> ssl.SSLContext:
    """Return a server's context with a certificate of its own."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    load_certificate(context, renew(None, ["localhost"], now_utc()))
    return context


async def main(directory: Path, port: int, limits: Limits, ready: Callable[[], object]) -> None:
    """Serve until SIGTERM; `ready` is called once it listens."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(LINE_FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    engine = Engine(directory)
    await engine.start()
    for number in range(JOBS):
        uid = f"job-{number}"
        wanted = job(NODES, 1000)
        metadata = wanted.metadata.model_copy(update={"uid": uid, "name": uid})
        await engine.submit(wanted.model_copy(update={"metadata": metadata}))
        await engine.set_eligible_nodes(uid, [f"node-{i}" for i in range(NODES)])
    site = await serve(application(engine, identify), listen("127.0.0.1", port), certificate(), limits=limits)
    ready()
    await stop.wait()
    await site.close()
    await engine.stop()


def again(directory: Path, port: int) -> None:
    """Serve in a new process for each line that comes."""
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            asyncio.run(main(directory, port, Limits(), partial(print, "ready", flush=True)))
            os._exit(0)
        print(f"pid {child}", flush=True)
        print(f"exit {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)


def program() -> None:
    """Be a forked process with arguments DIRECTORY, PORT and LIMITS, JSON; DIRECTORY/ready says that it listens."""
    _, directory, port, limits = sys.argv
    ready = (Path(directory) / "ready").touch
    asyncio.run(main(Path(directory), int(port), Limits(**json.loads(limits)), ready))


if __name__ == "__main__":
    again(Path(sys.argv[1]), int(sys.argv[2]))
