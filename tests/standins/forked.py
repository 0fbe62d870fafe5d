# SPDX-License-Identifier: Apache-2.0
"""Programs that begin at once: forked from a process that has imported what takes them seconds."""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

from fedpipe_operator.engine import worker

PRELOADED = ["fedpipe_operator.kube.run", "fedpipe_operator.aggregate", "fedpipe_operator.planner"]
"""They bring aiohttp, kopf, numpy and the wire, for the operator, agents and the engine's worker."""

_LOCK = threading.Lock()


def preload() -> None:
    """Have the fork server import what programs need, before anything is forked; workers come from it too."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    worker.START_METHOD = "forkserver"


def _started(given: tuple[Any, ...]) -> Any:
    process = multiprocessing.get_context("forkserver").Process(target=_run, args=given)
    process.start()
    return process


class Forked:
    """A function run as a program; of subprocess.Popen what tests use.

    Args:
        main: importable; what it returns or raises ends the process as it would end a program.
        arguments: of the command line, without the program's name.
        log: gets standard output and standard error, at its end.
        environment: all of it.
        directory: to work in.
    """

    def __init__(
        self,
        main: Callable[[], object],
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
        directory: Path,
    ) -> None:
        given = (main, list(arguments), str(log), dict(environment), str(directory))
        with _LOCK:
            try:
                self._process = _started(given)
            except (ConnectionError, EOFError):
                # Python's fork server ends when a connection closes at once; the next start makes another.
                self._process = _started(given)
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Return its exit code, None while it runs."""
        # Two threads that read the exit code at once would both miss it.
        with _LOCK:
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Return its exit code once it has ended; TimeoutExpired after so many seconds."""
        connection.wait([self._process.sentinel], timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal to it."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        with _LOCK:
            self._process.terminate()

    def kill(self) -> None:
        """Send SIGKILL."""
        with _LOCK:
            self._process.kill()


def _run(
    main: Callable[[], object], arguments: list[str], log: str, environment: dict[str, str], directory: str
) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(file, number)
    os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    # The fork server runs: what this program forks comes from the same one.
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    server.ensure_running = lambda: None
    worker.START_METHOD = "forkserver"
    sys.argv = [main.__module__, *arguments]
    sys.exit(main())  # type: ignore[arg-type]
