# SPDX-License-Identifier: Apache-2.0
"""What the agent says on its terminal, which a cluster stores: its own lines, nothing that a library prints.

A library may quote a row of the data anywhere: in a warning, a log record, a progress bar, a panic of its
compiled code. No list of such places is complete, so the outputs are closed to all but the agent's own log.
"""

import contextlib
import faulthandler
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import IO, NoReturn

from fedpipe_api.logs import LineFormatter

from .errors import describe, trace

log = logging.getLogger(__name__)

_PACKAGE = __name__.split(".", 1)[0]


class _Formatter(LineFormatter):
    """Formats a record as one line, and tracebacks without the texts of their exceptions."""

    def formatException(self, ei: object) -> str:  # noqa: N802, the base class's name
        error = ei[1] if isinstance(ei, tuple) else None
        return trace(error).rstrip() if isinstance(error, BaseException) else ""


@contextlib.contextmanager
def own_lines_only() -> Iterator[None]:
    """Keep all but the log records of this package off standard output and standard error.

    Also what compiled code writes to the file descriptors. A crash still shows the places it happened at.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace"))
        null = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        for number in (1, 2):
            stack.callback(_restore, number, os.dup(number))
            os.dup2(null.fileno(), number)
        stack.enter_context(contextlib.redirect_stdout(null))
        stack.enter_context(contextlib.redirect_stderr(null))
        stack.enter_context(_logging_to(kept))
        stack.enter_context(_crashes_to(kept))
        yield


def end(status: int) -> NoReturn:
    """End the process at once.

    Libraries take seconds to end with the interpreter, in which a runner that knows of the agent's failure
    waits for its status; and they may quote data even then.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _restore(number: int, copy: int) -> None:
    os.dup2(copy, number)
    os.close(copy)


@contextlib.contextmanager
def _logging_to(stream: IO[str]) -> Iterator[None]:
    """Write this package's log records to the stream, and how a thread of its own died."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Formatter("%(message)s"))
    handler.addFilter(logging.Filter(_PACKAGE))
    package = logging.getLogger(_PACKAGE)
    before, hook = package.level, threading.excepthook
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    threading.excepthook = _thread_died
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(before)
        threading.excepthook = hook


@contextlib.contextmanager
def _crashes_to(stream: IO[str]) -> Iterator[None]:
    """Write the frames of a crash (a segmentation fault, an abort) to the stream."""
    if faulthandler.is_enabled():
        yield
        return
    faulthandler.enable(stream)
    try:
        yield
    finally:
        faulthandler.disable()


def _thread_died(ended: threading.ExceptHookArgs) -> None:
    name = ended.thread.name if ended.thread else "unknown"
    log.error(
        "thread %s: %s", name, describe(ended.exc_value) if ended.exc_value else ended.exc_type.__name__
    )
