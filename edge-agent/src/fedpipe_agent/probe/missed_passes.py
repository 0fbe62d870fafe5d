# SPDX-License-Identifier: Apache-2.0
"""Reads the backends, each in a child process on every pass; a few passes without an answer are forgiven.

A child, because a driver's library can hang inside the driver, can crash, and keeps what it loaded first:
after a driver upgrade only a fresh process loads the new one. The parent never loads any.
"""

from functools import partial
from pathlib import Path

from pydantic import ValidationError

from fedpipe_api.node import NodeReason

from .backends import BACKENDS
from .child import Child, Died, Stuck, Wait
from .reading import Backend, Fault, Reading

HELD_PASSES = 3
"""Passes in a row that may go without an answer while the last one stands: the node may just be busy."""


class Reader:
    """Gives a backend up to `timeout` seconds; `root` is where /proc and /sys are found."""

    def __init__(self, timeout: float, root: Path = Path("/")) -> None:
        self._timeout = timeout
        self._root = root
        self._children = [(backend, Child(timeout)) for backend in BACKENDS]
        self._last: dict[str, tuple[Reading, int]] = {}

    def read(self, wait: Wait | None = None) -> Reading:
        """Return the reading of the first backend that finds a GPU, working or not. `wait`: see `Child.ask`.

        Without any it is one with boards, or the first. A hang, a crash or malformed output gives a fault
        where there is a GPU or its driver; without either, the process that looked was starved.
        """
        readings = []
        for backend, child in self._children:
            reading = self._held(backend, self._ask(backend, child, wait))
            reading = reading.model_copy(update={"source": backend.SOURCE})
            if reading.devices or reading.silent:
                return reading
            readings.append(reading)
        return next((reading for reading in readings if reading.boards), readings[0])

    def _held(self, backend: Backend, reading: Reading) -> Reading:
        """Return the last answer in the place of the first few that fail to come."""
        if reading.fault is None or reading.fault.reason is not backend.TIMED_OUT:
            self._last[backend.NAME] = reading, 0
            return reading
        last, missed = self._last.get(backend.NAME, (reading, HELD_PASSES))
        if missed >= HELD_PASSES:
            return reading
        self._last[backend.NAME] = last, missed + 1
        return last

    def _ask(self, backend: Backend, child: Child, wait: Wait | None) -> Reading:
        try:
            return Reading.model_validate_json(child.ask(partial(_read, backend, self._root), wait))
        except (Stuck, TimeoutError, Died, ValidationError) as error:
            return self._explained(backend, error) if backend.present(self._root) else Reading()

    def _explained(self, backend: Backend, error: Exception) -> Reading:
        name = backend.NAME
        match error:
            case Stuck():
                text = (
                    f"an {name} call hangs in the kernel since an earlier pass; reboot the node if it stays"
                )
                return _failed(backend.TIMED_OUT, text)
            case TimeoutError():
                return _failed(backend.TIMED_OUT, f"{name} did not answer within {self._timeout:g} s")
            case ValidationError():
                return _failed(backend.FAILED, f"{name} answered nonsense: {error.errors()[0]['msg']}")
        return _failed(backend.FAILED, f"the process that reads {name} died {error}")


def _read(backend: Backend, root: Path) -> bytes:
    try:
        reading = backend.collect(root)
    except Exception as error:
        reading = _failed(backend.FAILED, f"{backend.NAME} could not be read: {error!r}"[:512])
    return reading.to_json().encode()


def _failed(reason: NodeReason, message: str) -> Reading:
    return Reading(fault=Fault(reason=reason, message=message))
