# SPDX-License-Identifier: Apache-2.0
"""Reads the backends, each in a child process of its own on every pass.

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


class Reader:
    """Gives a backend up to `timeout` seconds; `root` is where /proc and /sys are found."""

    def __init__(self, timeout: float, root: Path = Path("/")) -> None:
        self._timeout = timeout
        self._root = root
        self._children = [(backend, Child(timeout)) for backend in BACKENDS]

    def read(self, wait: Wait | None = None) -> Reading:
        """Return the reading of the first backend that finds a GPU, working or not. `wait`: see `Child.ask`.

        Without any it is one with boards, or the first. A hang, a crash or malformed output gives a fault.
        """
        readings = []
        for backend, child in self._children:
            reading = self._ask(backend, child, wait).model_copy(update={"source": backend.SOURCE})
            if reading.devices or reading.silent:
                return reading
            readings.append(reading)
        return next((reading for reading in readings if reading.boards), readings[0])

    def _ask(self, backend: Backend, child: Child, wait: Wait | None) -> Reading:
        name = backend.NAME
        try:
            return Reading.model_validate_json(child.ask(partial(_read, backend, self._root), wait))
        except Stuck:
            return _failed(
                backend.TIMED_OUT,
                f"an {name} call hangs in the kernel since an earlier pass; reboot the node if it stays",
            )
        except TimeoutError:
            return _failed(backend.TIMED_OUT, f"{name} did not answer within {self._timeout:g} s")
        except Died as how:
            return _failed(backend.FAILED, f"the process that reads {name} died {how}")
        except ValidationError as error:
            return _failed(backend.FAILED, f"{name} answered nonsense: {error.errors()[0]['msg']}")


def _read(backend: Backend, root: Path) -> bytes:
    try:
        reading = backend.collect(root)
    except Exception as error:
        reading = _failed(backend.FAILED, f"{backend.NAME} could not be read: {error!r}"[:512])
    return reading.to_json().encode()


def _failed(reason: NodeReason, message: str) -> Reading:
    return Reading(fault=Fault(reason=reason, message=message))
