# SPDX-License-Identifier: Apache-2.0
"""Work that can hang, done in a child process with a timeout.

The probe starts no thread, so forking it is safe and costs a few milliseconds.
"""

import ctypes
import gc
import os
import select
import signal
import time
from collections.abc import Callable

ANSWER_LIMIT = 1024 * 1024
PR_SET_PDEATHSIG = 1

Wait = Callable[[int, float], bool]
"""Waits until a file descriptor is readable, at most so many seconds; says whether it is."""


class Stuck(Exception):
    """An earlier child was killed and has not gone: it is in a call that the kernel does not give back."""


class Died(Exception):
    """The child ended without an answer; the text says how."""


class Child:
    """Does one piece of work at a time, each in a child of its own, within `timeout` seconds."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._stuck: int | None = None

    def ask(self, work: Callable[[], bytes], wait: Wait | None = None) -> bytes:
        """Return what `work` returns. Raises TimeoutError, Died, Stuck.

        `wait` lets the caller do other work meanwhile. While a killed child has not gone no second one is
        started, so hung children never pile up.
        """
        if self._stuck is not None and not _gone(self._stuck, 0.0):
            raise Stuck
        self._stuck = None
        receive, send = os.pipe()
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            _run(work, send, parent)
        os.close(send)
        try:
            answer = _receive(receive, self._timeout, wait or _wait_readable)
        finally:
            os.close(receive)
        if answer is None:
            os.kill(child, signal.SIGKILL)
            if not _gone(child, 0.2):
                self._stuck = child
            raise TimeoutError(f"no answer within {self._timeout:g} s")
        _, exit_status = os.waitpid(child, 0)
        if exit_status:
            code = os.waitstatus_to_exitcode(exit_status)
            raise Died(f"of signal {-code}" if code < 0 else f"with exit code {code}")
        return answer


def _run(work: Callable[[], bytes], send: int, parent: int) -> None:
    """Work, write the answer to `send` and end the process; never returns."""
    code = 70
    # A collection would copy the parent's whole heap to free nothing.
    gc.disable()
    try:
        # Nobody else would end a hung child of a parent that was killed.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            return  # it was killed before the kernel knew
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        # A hung child must hold none of the parent's sockets.
        os.closerange(3, send)
        os.closerange(send + 1, 2**20)
        data = work()
        while data:
            data = data[os.write(send, data) :]
        code = 0
    finally:
        os._exit(code)


def _receive(receive: int, timeout: float, wait: Wait) -> bytes | None:
    """Return all bytes up to the end of the stream, or None when the time is over."""
    data = b""
    end = time.monotonic() + timeout
    while len(data) <= ANSWER_LIMIT:
        if not wait(receive, max(0.0, end - time.monotonic())):
            return None
        part = os.read(receive, 65536)
        if not part:
            return data
        data += part
    return None


def _wait_readable(descriptor: int, seconds: float) -> bool:
    return bool(select.select([descriptor], [], [], seconds)[0])


def _gone(child: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while True:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.005)
